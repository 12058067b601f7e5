"""A composed policy: a causal language model from transformers rewrites the prompt, a diffusers pipeline draws it."""

from common.torchvision_cpu import patch

# diffusers and transformers import torchvision, whose operators may not fit the installed torch.
patch()
