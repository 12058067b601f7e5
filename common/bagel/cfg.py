"""Classifier-free guidance with BAGEL's renormalisations: three velocities become one.

v_text is the velocity under a context without the prompt, v_image under one without the reasoning (in editing: without
the instruction, and without the image), s_t and s_i the scales:

    v_t = v_text + s_t (v - v_text),    v_g = v_image + s_i (v_t - v_image)

`global` shrinks v_g to the norm of v over a whole image, `channel` over each latent token; `text_channel` shrinks each
token of v_t before the image guidance. Guidance needs s_t > 1; without it s_i means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.bagel.decoder import Context
from common.config import Cfg

if TYPE_CHECKING:
    from common.bagel.policy import BagelPolicy


@dataclass(frozen=True)
class Branches:
    """The contexts of M guided images: all of it, without the prompt, without the reasoning. Rope positions are each
    context's own. image is None where s_i = 1 leaves it unused."""

    full: Context
    text: Context
    image: Context | None

    @classmethod
    def prefill(
        cls, policy: BagelPolicy, full: list[list[int]], text: list[list[int]], image: list[list[int]], cfg: Cfg
    ) -> Branches:
        """From the token ids of M chains; those of a branch may be none at all."""
        return cls(policy.prefill(full), policy.prefill(text), policy.prefill(image) if cfg.image_scale > 1 else None)


def guided_velocity(
    policy: BagelPolicy, x_t: Tensor, t: Tensor, branches: Branches, grid: tuple[int, int], cfg: Cfg
) -> Tensor:
    """x_t [M, N, D], t [M] -> v [M, N, D] fp32: guided where lo < t <= hi of cfg.interval, plain elsewhere."""
    v = policy.velocity(x_t, t, branches.full, grid)
    if not cfg.enabled or not active(t, cfg).any():
        return v
    v_text = policy.velocity(x_t, t, branches.text, grid)
    v_image = policy.velocity(x_t, t, branches.image, grid) if branches.image else None
    return torch.where(active(t, cfg)[:, None, None], combine(v, v_text, v_image, cfg), v)


def active(t: Tensor, cfg: Cfg) -> Tensor:
    """Which times [M] are guided."""
    low, high = cfg.interval
    return (t > low) & (t <= high)


def combine(v: Tensor, v_text: Tensor, v_image: Tensor | None, cfg: Cfg) -> Tensor:
    """The guided velocity [M, N, D] of three; v_image is used with cfg.image_scale > 1 only."""
    if not cfg.enabled:
        return v
    guided = v_text + cfg.text_scale * (v - v_text)
    if cfg.renorm == "text_channel":
        guided = _shrunk(guided, v, (-1,), cfg.renorm_min)
    if v_image is not None and cfg.image_scale > 1:
        guided = v_image + cfg.image_scale * (guided - v_image)
    if cfg.renorm == "global":
        guided = _shrunk(guided, v, (-2, -1), cfg.renorm_min)
    elif cfg.renorm == "channel":
        guided = _shrunk(guided, v, (-1,), cfg.renorm_min)
    return guided


def _shrunk(guided: Tensor, v: Tensor, dims: tuple[int, ...], least: float) -> Tensor:
    """guided times ||v|| / ||guided|| over dims, the factor held in [least, 1]."""
    norm, target = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (guided, v))
    return guided * (target / (norm + 1e-8)).clamp(least, 1.0)
