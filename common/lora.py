"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: what is trained, and the plain weights that other programs see.

Learner and denoiser hold them as adapters, so only A and B travel. vLLM and checkpoints get W + alpha / rank B A under
the layer's own name, as they would load any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from common.config import ConfigError, Lora
from common.policy import Policy, PolicyOutput
from common.torchvision_cpu import patch

ADAPTER = "default"


def add_adapters(policy: Policy, settings: Lora) -> None:
    """Freezes the policy and puts trainable adapters, at first without effect, beside the linear layers named.

    ConfigError if a half of the policy has none of these layers, or if a name that the recipe gives is no layer's.
    """
    patch()
    from peft import LoraConfig, inject_adapter_in_model

    policy.requires_grad_(False)
    names = settings.target_modules
    layers = [path for path, module in policy.named_modules() if isinstance(module, nn.Linear)]
    unknown = [name for name in names if not any(_named(path, (name,)) for path in layers)]
    # The usual names are of all families, of which a policy is one.
    if names != Lora().target_modules and unknown:
        raise ConfigError(
            f"learner.lora.target_modules names {unknown[0]}, which is no linear layer of this policy; its layers end "
            f"in {', '.join(sorted({path.rpartition('.')[2] for path in layers}))}"
        )
    if len(unknown) < len(names):
        peft = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(names))  # type: ignore[arg-type]
        meta = next(policy.parameters()).is_meta
        inject_adapter_in_model(peft, policy, adapter_name=ADAPTER, low_cpu_mem_usage=meta)
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


def plain_weights(policy: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights of a policy under the names they have without adapters, an adapted layer's as W + alpha / rank B A in W's
    dtype. weights: any of the policy's, by its own names; of an adapted layer A and B, too."""
    scales = {name: layer.scaling[ADAPTER] for name, layer in adapted(policy)}
    for name, tensor in weights.items():
        layer, inside, leaf = name.rpartition(".base_layer.")
        if not inside:
            if ".lora_" not in name:
                yield name, tensor
        elif leaf == "weight":
            down, up = (weights[f"{layer}.lora_{part}.{ADAPTER}.weight"].detach() for part in "AB")
            # A checkpoint's A and B are masters on the CPU, wherever W is.
            update = scales[layer] * (up.float() @ down.float())
            yield f"{layer}.{leaf}", (tensor.detach().float() + update.to(tensor.device)).to(tensor.dtype)
        else:
            yield f"{layer}.{leaf}", tensor


def reference_of(policy: Policy) -> Callable[..., PolicyOutput]:
    """The forward without adapters: a reference that costs no second copy of the weights."""

    def forward(*args: object) -> PolicyOutput:
        with _switched_off(policy):
            output: PolicyOutput = policy(*args)
        return output

    return forward


@contextmanager
def _switched_off(policy: Policy) -> Iterator[None]:
    layers = [layer for _, layer in adapted(policy)]
    # peft would train all of them from then on.
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
