"""BAGEL: the unified model, its parts and its files."""

from common.torchvision_cpu import patch

# diffusers and transformers import torchvision, whose operators may not fit the installed torch.
patch()
