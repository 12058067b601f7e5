"""What differs between pipeline classes: how a prompt is encoded, latents are laid out, and the transformer called.

Every family's velocity is ours: t in [0, 1], x_t = (1 - t) x_0 + t noise, v = noise - x_0. FlowMatchEuler steps with
sigma = t and the same sign, x + (sigma_next - sigma) v, so that no family turns anything round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders made of M prompts: embeds [M, L, H] and, where the family has them, pooled [M, P] and
    mask [M, L], True where a token is real."""

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def take(self, index: Tensor) -> Conditioning:
        """Rows by index [M] (rows may repeat)."""
        pooled = None if self.pooled is None else self.pooled[index]
        return Conditioning(self.embeds[index], pooled, None if self.mask is None else self.mask[index])


class Family(ABC):
    """One pipeline class. transformer and vae: the content of the parts' config.json; guidance: the scale that a
    guidance-distilled transformer is told, which takes the place of a second branch."""

    patch = 2
    """Latent pixels along one side of a token."""

    def __init__(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], guidance: float) -> None:
        self.transformer, self.vae, self.guidance = transformer, vae, guidance

    @property
    def token_dim(self) -> int:
        """Numbers in one latent token."""
        return int(self.transformer["in_channels"])

    @property
    def vae_scale(self) -> int:
        """Pixels per latent pixel along one side."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (rows, columns) of an image in pixels; ValueError if the size does not fit."""
        side = self.vae_scale * self.patch
        if height % side or width % side:
            raise ValueError(
                f"image size {height}x{width} is not a multiple of {side} pixels, which this pipeline needs"
            )
        return height // side, width // side

    @property
    def grid_step(self) -> int:
        """What rows and columns of a grid are multiples of."""
        return 1

    @abstractmethod
    def blank(self, images: int, words: int) -> Conditioning:
        """Conditioning without numbers (meta tensors), for images whose final prompt has so many tokens."""

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """The pipeline's own text encoders, without gradient."""

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, grid: tuple[int, int]
    ) -> Tensor:
        """x_t [M, N, D] in the transformer's dtype, t [M] fp32 -> v [M, N, D]."""

    @abstractmethod
    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens [M, N, D] -> what the VAE's decoder takes, unscaled."""

    def decode(self, pipeline: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens [M, N, D] -> pixels [M, 3, H, W] in about [-1, 1]; one image at a time, as its activations are many
        times the size of its latents."""
        vae = pipeline.vae
        latents = self.latents(tokens, grid).to(vae.dtype)
        return torch.cat([vae.decode(one, return_dict=False)[0] for one in latents.split(1)])


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens of 2x2 latent pixels, channel slowest inside a token, [M, N, 4C] -> [M, C, 2 rows, 2 columns]: the
    layout that FLUX and Qwen-Image share."""
    m, (rows, columns) = len(tokens), grid
    x = tokens.reshape(m, rows, columns, -1, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(m, -1, 2 * rows, 2 * columns)
