"""What vLLM needs on a CPU, before it is imported: a quick start, and weights that can be replaced."""

from __future__ import annotations

import os

import torch

from common.torchvision_cpu import patch


def prepare_cpu() -> None:
    """Makes vLLM start quickly on CPU, in this process, with weights that can be replaced.

    Call it before anything imports vLLM. It may be called again.
    """
    patch()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from vllm import ModelRegistry
    from vllm.model_executor.layers import utils
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    # vLLM looks at classes registered by name in a new Python process, where torchvision would not be patched.
    ModelRegistry.register_model("Qwen2ForCausalLM", Qwen2ForCausalLM)

    pack = utils.dispatch_cpu_unquantized_gemm
    if getattr(pack, "keeps_weight", False):
        return

    def pack_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        # vLLM frees a weight once it is packed, and then has nothing to load the next one into.
        pack(layer, remove_weight=False)

    pack_and_keep.keeps_weight = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = pack_and_keep
