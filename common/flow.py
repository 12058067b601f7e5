"""Rectified flow: schedules, one reverse step, and the ratio of two policies (ALGORITHM sections 3 and 4 of the paper).

x_t = (1 - t) x_0 + t eps and v = eps - x_0; time runs from 1 (noise) to 0 (data), so dt = t_next - t is negative.
Functions take torch tensors or Python floats where only times are involved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from common.config import Objective

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
    """mu = keep * x + drive * v, and x' = mu + std * z: one reverse step, all scalars or [M] tensors."""

    keep: Tensor
    drive: Tensor
    std: Tensor


def euler_step(t: Tensor, t_next: Tensor) -> StepCoefficients:
    """The deterministic step x' = x + v dt; t, t_next [M]."""
    return sde_step(t, t_next, 0.0)


def sde_step(t: Tensor, t_next: Tensor, noise_level: float) -> StepCoefficients:
    """FlowGRPO's SDE: sigma = a sqrt(t / (1 - t)); at t = 1 the next time stands in the denominator. t, t_next [M]."""
    t, t_next = t.double(), t_next.double()
    return _reverse_sde(t, t_next, noise_level**2 * t / (1 - torch.where(t >= 1, t_next, t)))


def dance_step(t: Tensor, t_next: Tensor, noise_level: float) -> StepCoefficients:
    """DanceGRPO's SDE: the same with a constant sigma = a."""
    t, t_next = t.double(), t_next.double()
    return _reverse_sde(t, t_next, torch.full_like(t, noise_level**2))


def _reverse_sde(t: Tensor, t_next: Tensor, variance: Tensor) -> StepCoefficients:
    """mu = x (1 + sigma^2/(2t) dt) + v (1 + sigma^2 (1-t)/(2t)) dt and s = sigma sqrt(-dt), in fp64. sigma 0 gives the
    Euler step."""
    dt = t_next - t
    keep = 1 + variance / (2 * t) * dt
    drive = (1 + variance * (1 - t) / (2 * t)) * dt
    return StepCoefficients(keep.float(), drive.float(), (variance * -dt).sqrt().float())


def cps_step(t: Tensor, t_next: Tensor, noise_level: float) -> StepCoefficients:
    """Flow-CPS: s = t_next sin(a pi/2), mu = (1 - t_next) x_0 + sqrt(t_next^2 - s^2) x_1 with x_0 = x - t v and
    x_1 = x + (1 - t) v, so that the total noise stays that of the schedule. No noise in a step to t_next = 0."""
    t, t_next = t.double(), t_next.double()
    std = t_next * math.sin(noise_level * math.pi / 2)
    rest = (t_next**2 - std**2).sqrt()
    keep = 1 - t_next + rest
    drive = rest * (1 - t) - (1 - t_next) * t
    return StepCoefficients(keep.float(), drive.float(), std.float())


def mean_of(coefficients: StepCoefficients, x: Tensor, v: Tensor) -> Tensor:
    """mu [M, N, D] from x and v [M, N, D] and coefficients [M]."""
    return coefficients.keep[:, None, None] * x + coefficients.drive[:, None, None] * v


def step_log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log density of a step, averaged over latent dimensions: [M, N, D], std [M] -> [M]."""
    square = ((x_next - mean) ** 2).flatten(1).mean(1)
    return -square / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


def cps_log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Flow-CPS's log-prob, without the variance: -||x' - mu||^2, mean over latent dimensions, [M]."""
    return -((x_next - mean) ** 2).flatten(1).mean(1)


@dataclass(frozen=True)
class Sampler:
    """How a window step is drawn, (t, t_next, noise level) -> coefficients, and what -||x' - mu||^2 counts with in the
    log-prob that its authors take of it, s -> [M]."""

    step: Callable[[Tensor, Tensor, float], StepCoefficients]
    precision: Callable[[Tensor], Tensor]


def step_precision(std: Tensor) -> Tensor:
    """1 / (2 s^2), as in `step_log_prob`."""
    return 1 / (2 * std**2)


SAMPLERS = {
    "flow_sde": Sampler(sde_step, step_precision),
    "flow_cps": Sampler(cps_step, torch.ones_like),
    "dance": Sampler(dance_step, step_precision),
}


def ratio_norm_log(x_next: Tensor, mean_old: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """RatioNorm's log ratio [M] in the form without 1/s: -mean(z (mu_old - mu)), z = (x' - mu_old) / s."""
    z = (x_next - mean_old) / std[:, None, None]
    return -(z * (mean_old - mean)).flatten(1).mean(1)


def plain_log_ratio(x_next: Tensor, mean_old: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """log p_new(x') - log p_old(x') [M], averaged over latent dimensions, from a sampler's precision [M].

    Not as a difference of log-probs: of size 1 in fp32, they would round it to about 1e-7, the paper's clip to ten
    steps.
    """
    return ((mean - mean_old) * (2 * x_next - mean - mean_old)).flatten(1).mean(1) * precision


def gaussian_kl(velocity: Tensor, other: Tensor, move: StepCoefficients) -> Tensor:
    """KL of two policies' steps from one x, ||mu - mu'||^2 / (2 s^2), mean over latent dimensions: [M, N, D] -> [M]."""
    square = ((velocity - other) ** 2).flatten(1).mean(1)
    return square * (move.drive / move.std) ** 2 / 2


def image_bound(objective: Objective, latent_size: int) -> float:
    """What bounds an image update, by objective.image_trust: the clip, with its ValueError, or the KL."""
    if objective.image_trust == "kl":
        return objective.image_kl_bound
    return image_clip(objective.image_clip, latent_size)


def image_clip(setting: float | str, latent_size: int) -> float:
    """The bound of the log image ratio that a recipe's setting means for a latent of N * D numbers. "scaled" is the
    paper's: |log ratio| falls with 1/sqrt(size). ValueError for a bound that fp32 cannot tell from a ratio of 1."""
    clip = PAPER_IMAGE_CLIP * math.sqrt(PAPER_LATENT_SIZE / latent_size) if isinstance(setting, str) else setting
    resolution = torch.finfo(torch.float32).eps
    if clip < resolution:
        raise ValueError(
            f"objective.image_clip is {setting}, which is {clip:.2g} for a latent of {latent_size} numbers and less "
            f"than fp32 can tell from a ratio of 1 ({resolution:.2g}); give a larger one"
        )
    return clip
