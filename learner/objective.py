"""The two clipped objectives and the regulariser, as functions of tensors (paper sections 3 and 4).

Sizes: C chains, P scored tokens of which `owner` [P] names the chain, K window steps a chain, M = C * K images of N
latent tokens with D numbers. The dictionaries hold the choices that the configuration offers by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.flow import gaussian_kl


@dataclass(frozen=True)
class Surrogate:
    """A loss to minimise per chain [C], and for the metrics log r and whether the bound took effect, per element."""

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), and where the clipped branch was taken: decided on log r, since r rounds a tiny clip away.
    log_ratio and advantage of one shape; low and high bound log r."""
    own = log_ratio.detach()
    clipped = ((own > high) & (advantage > 0)) | ((own < -low) & (advantage < 0))
    bounded = torch.where(clipped, own.clamp(-low, high), log_ratio)
    return -bounded.exp() * advantage, clipped


def sum_by_chain(values: Tensor, owner: Tensor, chains: int) -> Tensor:
    """[P] -> [C]."""
    return torch.zeros(chains, device=values.device).index_add(0, owner, values)


def sequence_log_ratio(log_ratio: Tensor, owner: Tensor, chains: int) -> Tensor:
    """GSPO: every token has its chain's mean log ratio, [P] -> [P]."""
    count = sum_by_chain(torch.ones_like(log_ratio), owner, chains).clamp(min=1)
    return (sum_by_chain(log_ratio, owner, chains) / count)[owner]


TEXT_RATIOS = {"token": lambda log_ratio, owner, chains: log_ratio, "sequence": sequence_log_ratio}

# (tokens of each chain [C], mean tokens of the optimizer step's chains, longest reasoning) -> divisors [C].
TEXT_LENGTHS = {
    "chain_mean": lambda own, mean, longest: own.clamp(min=1),
    "token_mean": lambda own, mean, longest: torch.full_like(own, max(mean, 1e-9)),
    "constant_length": lambda own, mean, longest: torch.full_like(own, longest),
}


def importance_weight(old: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """min(p_old / p_behaviour, cap) of tokens that another engine sampled (truncated importance sampling), [P]."""
    return (old - behaviour).exp().clamp(max=cap).detach()


def text_objective(
    log_ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    owner: Tensor,
    lengths: Tensor,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """GRPO on tokens: per chain, the weighted sum over its tokens of the clipped surrogate, divided by lengths [C].

    log_ratio and weight [P], advantage [C]. clip_low and clip_high are those of the ratio: 1 - low and 1 + high.
    """
    loss, clipped = clipped_surrogate(log_ratio, advantage[owner], -math.log1p(-clip_low), math.log1p(clip_high))
    return Surrogate(sum_by_chain(weight * loss, owner, len(lengths)) / lengths, log_ratio.detach(), clipped)


def text_kl(logprobs: Tensor, reference: Tensor, owner: Tensor, chains: int) -> Tensor:
    """k3 estimate of KL(policy || reference) per chain [C], mean over its tokens."""
    difference = reference - logprobs
    k3 = difference.exp() - difference - 1
    count = sum_by_chain(torch.ones_like(k3), owner, chains).clamp(min=1)
    return sum_by_chain(k3, owner, chains) / count


def clip_trust(log_ratio: Tensor, advantage: Tensor, divergence: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """FlowGRPO: the clipped surrogate."""
    return clipped_surrogate(log_ratio, advantage, bound, bound)


def kl_trust(log_ratio: Tensor, advantage: Tensor, divergence: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Flow-DPPO: no gradient where the KL to the old step exceeds the bound and the update leads further away."""
    blocked = (divergence > bound) & (log_ratio.detach() * advantage > 0)
    loss = -log_ratio.exp() * advantage
    return torch.where(blocked, loss.detach(), loss), blocked


IMAGE_TRUSTS = {"clip": clip_trust, "kl": kl_trust}


def guard_weight(dt: Tensor) -> Tensor:
    """GRPO-Guard's gradient re-weight 1/dt of each window step, scaled to mean 1 over a chain's window: [C, K]."""
    inverse = 1 / dt.abs()
    return inverse / inverse.mean(1, keepdim=True)


def image_objective(
    log_ratio: Tensor, advantage: Tensor, divergence: Tensor, weight: Tensor, trust: str, bound: float
) -> Surrogate:
    """FlowGRPO on window steps, per chain the mean over its steps. log_ratio, divergence (KL to the old policy's steps)
    and weight [C, K], advantage [C]; bound: of the log ratio or of the divergence, as trust has it."""
    loss, blocked = IMAGE_TRUSTS[trust](log_ratio, advantage[:, None].expand_as(log_ratio), divergence, bound)
    return Surrogate((weight * loss).mean(1), log_ratio.detach(), blocked)


def velocity_mse(velocity: Tensor, reference: Tensor) -> Tensor:
    """||v_theta - v_ref||^2 per image, mean over latent dimensions: [M, N, D] -> [M]."""
    return ((velocity - reference) ** 2).mean((-1, -2))


# (velocity, reference velocity, coefficients of the steps) -> distance of each image [M].
REGULARISERS = {
    "velocity_mse": lambda velocity, reference, move: velocity_mse(velocity, reference),
    "latent_kl": gaussian_kl,
}
