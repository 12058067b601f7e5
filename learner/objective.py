"""The two clipped objectives and the regulariser, as functions of tensors (paper sections 3 and 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """A loss to minimise per chain [C], and for the metrics the ratio and whether it was clipped, per element."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) with the clip in log space, where a tiny clip is not lost to rounding, and where the
    clipped branch was taken. log_ratio and advantage of one shape; low and high bound log r."""
    ratio = log_ratio.exp()
    bounded = log_ratio.clamp(-low, high).exp()
    plain, limited = ratio * advantage, bounded * advantage
    return -torch.minimum(plain, limited), (limited < plain).detach()


def text_objective(
    logprobs: Tensor,
    old: Tensor,
    advantage: Tensor,
    owner: Tensor,
    chains: int,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """GRPO on tokens: per chain, the mean over its tokens of the clipped surrogate.

    logprobs and old [P], owner [P] the chain of each token, advantage [C]. clip_low and clip_high are those of the
    ratio: 1 - low and 1 + high.
    """
    log_ratio = logprobs - old
    loss, clipped = clipped_surrogate(log_ratio, advantage[owner], -math.log1p(-clip_low), math.log1p(clip_high))
    count = torch.zeros(chains, device=loss.device).index_add(0, owner, torch.ones_like(loss)).clamp(min=1)
    total = torch.zeros(chains, device=loss.device).index_add(0, owner, loss)
    return Surrogate(total / count, log_ratio.detach().exp(), clipped)


def text_kl(logprobs: Tensor, reference: Tensor, owner: Tensor, chains: int) -> Tensor:
    """k3 estimate of KL(policy || reference) per chain [C], mean over its tokens."""
    difference = reference - logprobs
    k3 = difference.exp() - difference - 1
    count = torch.zeros(chains, device=k3.device).index_add(0, owner, torch.ones_like(k3)).clamp(min=1)
    return torch.zeros(chains, device=k3.device).index_add(0, owner, k3) / count


def image_objective(log_ratio: Tensor, advantage: Tensor, clip: float) -> Surrogate:
    """FlowGRPO on window steps: log_ratio [C, K], advantage [C] -> per chain the mean over its steps."""
    loss, clipped = clipped_surrogate(log_ratio, advantage[:, None].expand_as(log_ratio), clip, clip)
    return Surrogate(loss.mean(1), log_ratio.detach().exp(), clipped)


def velocity_mse(velocity: Tensor, reference: Tensor) -> Tensor:
    """||v_theta - v_ref||^2 per image, mean over latent dimensions: [C, K, N, D] -> [C, K]."""
    return ((velocity - reference) ** 2).mean((-1, -2))
