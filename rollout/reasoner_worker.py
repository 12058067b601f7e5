"""The part of the reasoner that runs inside vLLM: how its workers take new weights, and what a CPU needs for that."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
from safetensors import safe_open

from common.torchvision_cpu import patch


class WorkerExtension:
    """Methods vLLM adds to each of its workers; ``get_model`` is the worker's own."""

    def load_reasoner_weights(self, source: str | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies weights into the running model.

        Args:
            source: the weights, or the path of a safetensors file that every worker can read.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        model.load_weights(_read_weights(source) if isinstance(source, str) else source)
        for module in model.modules():
            if hasattr(module, "cpu_linear"):
                # The CPU kernels multiply by a packed copy of the weight, not by the parameter.
                from vllm.model_executor.layers import utils

                utils.dispatch_cpu_unquantized_gemm(module, remove_weight=False)


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


def _read_weights(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)
