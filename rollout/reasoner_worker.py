"""What vLLM needs on a CPU, before it is imported: a quick start, and weights that can be replaced."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable

import torch

from common.torchvision_cpu import patch


def prepare_cpu(architectures: Iterable[str]) -> None:
    """Makes vLLM start quickly on CPU, in this process, with weights of these model classes that can be replaced.

    Call it before anything imports vLLM. It may be called again.
    """
    patch()
    # vLLM collects garbage five times while it starts, each time through all that was imported before, which stays.
    gc.freeze()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from vllm import ModelRegistry
    from vllm.model_executor.layers import utils

    for name in architectures:
        known = ModelRegistry.models.get(name)
        if known is not None:
            # vLLM looks at classes registered by name in a new Python process, where torchvision would not be patched.
            ModelRegistry.register_model(name, known.load_model_cls())

    pack = utils.dispatch_cpu_unquantized_gemm
    if getattr(pack, "keeps_weight", False):
        return

    def pack_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        # vLLM frees a weight once it is packed, and then has nothing to load the next one into.
        pack(layer, remove_weight=False)

    pack_and_keep.keeps_weight = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = pack_and_keep
