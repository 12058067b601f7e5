"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: what is trained, and the plain weights that everyone else sees.

Only the learner knows of adapters. Published weights and checkpoints hold W + alpha / rank B A under the layer's own
name, so that rollout, vLLM and other programs load them as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config import ConfigError, Lora
from common.policy import Policy, PolicyOutput
from common.torchvision_cpu import patch

ADAPTER = "default"


def add_adapters(policy: Policy, settings: Lora) -> None:
    """Freezes the policy and puts trainable adapters, at first without effect, beside the linear layers named.

    ConfigError if a half of the policy has none of these layers.
    """
    patch()
    from peft import LoraConfig, inject_adapter_in_model

    policy.requires_grad_(False)
    names = settings.target_modules
    for child in policy.children():
        if any(isinstance(m, nn.Linear) and _named(path, names) for path, m in child.named_modules()):
            peft = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(names))  # type: ignore[arg-type]
            meta = next(policy.parameters()).is_meta
            inject_adapter_in_model(peft, child, adapter_name=ADAPTER, low_cpu_mem_usage=meta)
    for role, pairs in policy.parameter_groups().items():
        if not pairs:
            raise ConfigError(
                f"learner.lora.target_modules is {', '.join(names)}: no linear layer of the {role} half is named so; "
                "add one of its names"
            )


def _named(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def adapted(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by name."""
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


@dataclass(frozen=True)
class Published:
    """A weight as everyone but the learner sees it. parts: the parameter itself, or W, A and B of an adapted layer,
    whose update is scaled."""

    parts: tuple[nn.Parameter, ...]
    scale: float = 0.0

    @property
    def trained(self) -> bool:
        return any(part.requires_grad for part in self.parts)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The parameter, or W + alpha / rank B A."""
        return _merged(*self.parts, self.scale) if len(self.parts) == 3 else self.parts[0]


def published(policy: nn.Module) -> dict[str, Published]:
    """All weights of a policy under the names they have without adapters."""
    layers = {
        f"{name}.weight": Published(
            (layer.base_layer.weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight),
            layer.scaling[ADAPTER],
        )
        for name, layer in adapted(policy)
    }
    plain = {_plain(name): Published((p,)) for name, p in policy.named_parameters() if ".lora_" not in name}
    return plain | layers


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _merged(base: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return (base.float() + scale * (up.float() @ down.float())).to(base.dtype)


def merged_weights(policy: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, W + alpha / rank B A) of every layer with an adapter, of weights by the policy's names; in W's dtype."""
    for name, layer in adapted(policy):
        down, up = (weights[f"{name}.lora_{part}.{ADAPTER}.weight"].detach() for part in "AB")
        base = weights[f"{name}.base_layer.weight"].detach()
        yield f"{name}.weight", _merged(base, down, up, layer.scaling[ADAPTER])


def plain_weights(policy: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights under the names they have without adapters, these merged; the same dict if there are none."""
    own = {_plain(name): tensor for name, tensor in weights.items() if ".lora_" not in name}
    return own | dict(merged_weights(policy, weights))


def reference_of(policy: Policy) -> Callable[..., PolicyOutput]:
    """The forward without adapters: a reference that costs no second copy of the weights."""

    def forward(*args: object) -> PolicyOutput:
        with _switched_off(policy):
            output: PolicyOutput = policy(*args)
        return output

    return forward


@contextmanager
def _switched_off(policy: Policy) -> Iterator[None]:
    for _, layer in adapted(policy):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in adapted(policy):
            layer.enable_adapters(True)
