"""How vLLM's workers take new weights: a backend of vLLM's weight-transfer API.

vLLM's own backends move bytes over NCCL or CUDA IPC only. Here the replica has received them already, over whichever
transport, for the denoiser's copy; what is left is to hand them on, on GPUs and CPUs alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

BACKEND = "hand_over"


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is nobody to connect to."""


@dataclass
class Source(WeightTransferUpdateInfo):
    """weights: (name, tensor) pairs in this process, or the path of a safetensors file that every worker can read."""

    weights: list[tuple[str, torch.Tensor]] | str


class HandOver(WeightTransferEngine[Nothing, Source]):
    """Loads in place; a worker that holds whole tensors then compares every one with what was given."""

    init_info_cls = Nothing
    update_info_cls = Source

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Source) -> None:
        """RuntimeError if the model does not hold what it was given."""
        source = update_info.weights
        weights = list(_read(source)) if isinstance(source, str) else source
        self.model.load_weights(weights)  # type: ignore[operator]
        if self.parallel_config.tensor_parallel_size == 1:
            for name, tensor in weights:
                if not torch.equal(loaded(self.model, name, tensor.shape), tensor.to(self.device)):
                    raise RuntimeError(f"vLLM does not hold {name} as it was given")

    def finish_weight_update(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "cpu_linear"):
                # The CPU kernels multiply by a packed copy of the weight, not by the parameter.
                from vllm.model_executor.layers import utils

                utils.dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Has every worker import this module, which makes the backend known."""


def loaded(model: torch.nn.Module, name: str, shape: torch.Size) -> torch.Tensor:
    """Where a weight of the checkpoint lies in vLLM's model, which stacks some and pads the vocabulary."""
    module, _, leaf = name.rpartition(".")
    parent, _, child = module.rpartition(".")
    for stacked, parts in model.packed_modules_mapping.items():  # type: ignore[union-attr, operator]
        if child in parts and len(parts) > 1:
            layer = model.get_submodule(f"{parent}.{stacked}")
            return layer.get_parameter(leaf).split(layer.output_partition_sizes)[parts.index(child)]
    return model.get_parameter(name)[: shape[0]]


def _read(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HandOver)
