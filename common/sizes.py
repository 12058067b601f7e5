"""What can be known of a policy from its configuration files alone: parameters, operations, memory. No weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.config import REPOSITORY, ConfigError, Model, resolve_path

CONFIGS = REPOSITORY / "deploy" / "recipes" / "configs"


@dataclass(frozen=True)
class ChainShape:
    """One chain in a training forward: tokens of its text, those that are scored, tokens of one image, window steps."""

    text: int
    scored: int
    image: int
    window: int


class Sizes(Protocol):
    """Counts of parameters by who holds them, operations (a multiply and an add are two), activations in bytes."""

    @property
    def trainable(self) -> dict[str, int]:
        """Parameters by role."""

    @property
    def policy(self) -> int:
        """Parameters of the policy, trained or not."""

    @property
    def frozen(self) -> int:
        """Parameters beside the policy: autoencoder, text encoders."""

    @property
    def reasoner(self) -> int:
        """Parameters that the reasoning engine holds."""

    @property
    def denoiser(self) -> int:
        """Parameters of the policy that the denoiser of a replica holds."""

    @property
    def twice(self) -> int:
        """Parameters that reasoning engine and denoiser both hold beside the GPU's other work."""

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
        """The context of one image and the largest activations of its velocity without gradient; width: bytes of a
        number."""

    def training_bytes(self, chain: ChainShape, width: int, recompute: bool) -> int:
        """What one chain's forward keeps for the backward with the most that one layer adds to it; recompute: only
        what enters a layer is kept."""


def is_here(model: Model) -> bool:
    """Whether the checkpoint itself is on this machine."""
    try:
        resolve_path(model.path)
    except ConfigError:
        return False
    return True


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


def sizes_of(model: Model) -> Sizes:
    """Sizes of the policy that a recipe's `model` names. ConfigError or CheckpointError."""
    from common.bagel.sizes import BagelSizes

    return BagelSizes.read(describing(model.path))
