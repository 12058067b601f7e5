"""What can be known of a policy from its configuration files alone: parameters, operations, memory. No weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.config import REPOSITORY, ConfigError, Model, TrainConfig, resolve_path

if TYPE_CHECKING:
    from common.policy import Policy

CONFIGS = REPOSITORY / "deploy" / "recipes" / "configs"


@dataclass(frozen=True)
class ChainShape:
    """One chain in a training forward: tokens of its text, those that are scored, tokens of one image, window steps."""

    text: int
    scored: int
    image: int
    window: int


@dataclass(frozen=True)
class Counts:
    """Parameters of a policy: all of them, those that a learner rank holds (adapters too), and those that are trained,
    and published after an update, by role."""

    policy: int
    held: int
    trainable: dict[str, int]

    @classmethod
    def of(cls, plain: Policy, trained: Policy) -> Counts:
        """plain: the policy; trained: the same as a learner trains it."""
        return cls(
            sum(p.numel() for p in plain.parameters()),
            sum(p.numel() for p in trained.parameters()),
            {role: sum(p.numel() for _, p in pairs) for role, pairs in trained.parameter_groups().items()},
        )


class Sizes(Protocol):
    """Counts of parameters by who holds them, operations (a multiply and an add are two), activations in bytes; width:
    bytes of a number."""

    @property
    def counts(self) -> Counts: ...

    def frozen_bytes(self, width: int) -> int:
        """What lies beside the policy: autoencoder, text encoders."""

    @property
    def reasoner(self) -> int:
        """Parameters that the reasoning engine holds."""

    @property
    def denoiser(self) -> int:
        """Parameters of the policy that the denoiser of a replica holds on its device."""

    @property
    def host(self) -> int:
        """Parameters of the policy that a replica holds in host memory."""

    @property
    def twice(self) -> int:
        """Parameters that reasoning engine and denoiser both hold on a device."""

    @property
    def kv_numbers(self) -> int:
        """Keys and values of one token in the reasoning engine, all layers."""

    def image_tokens(self, height: int, width: int) -> int:
        """Latent tokens of an image in pixels; ValueError if it does not fit the model."""

    def read_flops(self, tokens: int, scored: int) -> int:
        """Forward over one text."""

    def draw_flops(self, image: int, context: int) -> int:
        """One velocity of one image of `image` tokens under a text of `context`."""

    def drawing_bytes(self, image: int, context: int, width: int) -> int:
        """The context of one image and the largest activations of its velocity without gradient."""

    def decoding_bytes(self, images: int, image: int, width: int) -> int:
        """The largest activations while the autoencoder decodes images of `image` tokens; width: of the policy."""

    def training_bytes(self, chain: ChainShape, width: int, recompute: bool) -> int:
        """What one chain's forward keeps for the backward with the most that one layer adds to it; recompute: only
        what enters a layer is kept."""


def squarest(tokens: int, step: int = 1) -> tuple[int, int]:
    """The grid (rows, columns), both multiples of step, of so many tokens that is nearest to a square."""
    sides = (n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    rows = next(n for n in sides if n % step == 0 and tokens // n % step == 0)
    return rows, tokens // rows


def is_here(model: Model) -> bool:
    """Whether the checkpoint itself is on this machine."""
    return not elsewhere(model)


def elsewhere(model: Model) -> list[str]:
    """The paths of a recipe's `model` that are not on this machine."""
    missing = []
    for path in (model.path, model.pipeline):
        try:
            resolve_path(path or ".")
        except ConfigError:
            missing.append(str(path))
    return missing


def describing(path: str) -> Path:
    """The directory of a checkpoint, or of its JSON files shipped under the same name where the checkpoint itself is
    not here. ConfigError if there is neither."""
    try:
        return resolve_path(path)
    except ConfigError as error:
        shipped = CONFIGS / Path(path).name
        if shipped.is_dir():
            return shipped
        known = ", ".join(sorted(entry.name for entry in CONFIGS.iterdir()))
        raise ConfigError(f"{error}; configurations without weights are shipped for {known}") from error


def sizes_of(config: TrainConfig) -> Sizes:
    """Sizes of the policy that a recipe trains. ConfigError or CheckpointError."""
    from common.composed.source import composed_source
    from common.parameters import choose

    def chosen(policy: Policy) -> None:
        choose(policy, config.learner, config.optimizer)

    if source := composed_source(config.model, describing):
        from common.composed.sizes import ComposedSizes

        return ComposedSizes.read(source, chosen)
    from common.bagel.sizes import BagelSizes

    return BagelSizes.read(describing(config.model.path), chosen)
