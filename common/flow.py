"""Rectified flow: schedules, one reverse step, and the ratio of two policies (ALGORITHM sections 3 and 4 of the paper).

x_t = (1 - t) x_0 + t eps and v = eps - x_0; time runs from 1 (noise) to 0 (data), so dt = t_next - t is negative.
Functions take torch tensors or Python floats where only times are involved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PAPER_LATENT_SIZE = 262_144
PAPER_IMAGE_CLIP = 1e-6


def timesteps(points: int, shift: float) -> list[float]:
    """`points` times from exactly 1 to exactly 0, warped by t' = s t / (1 + (s - 1) t). N points are N - 1 steps."""
    if points < 2:
        raise ValueError(f"points is {points}; a schedule needs at least 2 (one step)")
    line = torch.linspace(1, 0, points, dtype=torch.float64)
    # Written so that t = 1 stays 1 for every shift: a first time just below 1 would have a huge sigma.
    return (shift * line / (1 - line + shift * line)).tolist()


@dataclass(frozen=True)
class StepCoefficients:
    """mu = keep * x + drive * v, and x' = mu + std * z: one FlowGRPO SDE step, all scalars or [M] tensors."""

    keep: Tensor
    drive: Tensor
    std: Tensor


def sde_step(t: Tensor, t_next: Tensor, noise_level: float) -> StepCoefficients:
    """Coefficients of the reverse SDE step from t to t_next [M], fp64 inside.

    sigma = a sqrt(t / (1 - t)); at t = 1 the next time stands in the denominator. With s = sigma sqrt(-dt):
    mu = x (1 + sigma^2/(2t) dt) + v (1 + sigma^2 (1-t)/(2t)) dt.  noise_level 0 gives the Euler step.
    """
    t, t_next = t.double(), t_next.double()
    dt = t_next - t
    variance = noise_level**2 * t / (1 - torch.where(t >= 1, t_next, t))
    keep = 1 + variance / (2 * t) * dt
    drive = (1 + variance * (1 - t) / (2 * t)) * dt
    return StepCoefficients(keep.float(), drive.float(), (variance * -dt).sqrt().float())


def mean_of(coefficients: StepCoefficients, x: Tensor, v: Tensor) -> Tensor:
    """mu [M, N, D] from x and v [M, N, D] and coefficients [M]."""
    return coefficients.keep[:, None, None] * x + coefficients.drive[:, None, None] * v


def step_log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log density of a step, averaged over latent dimensions: [M, N, D], std [M] -> [M]."""
    square = ((x_next - mean) ** 2).flatten(1).mean(1)
    return -square / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


def ratio_norm_log(x_next: Tensor, mean_old: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """RatioNorm's log ratio [M] in the form without 1/s: -mean(z (mu_old - mu)), z = (x' - mu_old) / s."""
    z = (x_next - mean_old) / std[:, None, None]
    return -(z * (mean_old - mean)).flatten(1).mean(1)


def plain_log_ratio(x_next: Tensor, mean_old: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log p_new(x') - log p_old(x') [M], averaged over latent dimensions."""
    return step_log_prob(x_next, mean, std) - step_log_prob(x_next, mean_old, std)


def scaled_image_clip(latent_size: int) -> float:
    """The paper's clip for another latent size: |log ratio| falls with 1/sqrt(size) (size = N * D)."""
    return PAPER_IMAGE_CLIP * math.sqrt(PAPER_LATENT_SIZE / latent_size)
