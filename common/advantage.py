"""Group-relative advantages (paper section 3; variants: Dr.GRPO, global std, GDPO's decoupled rewards)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-4


@dataclass(frozen=True)
class Advantages:
    """values [B, G] fp64 (0 where masked); mask [B, G] False for chains that must not contribute; the counts of
    groups without variance and of chains without a score."""

    values: NDArray[np.float64]
    mask: NDArray[np.bool_]
    zero_variance_groups: int
    unscored_chains: int


def group_advantages(rewards: NDArray[np.floating], *, std: str = "group", clip: float = 5.0) -> Advantages:
    """rewards [B, G], NaN where a chain has no score -> advantages shared by both modalities of a chain.

    std: "group" divides by the group's deviation + 1e-4, "global" by that of all scored chains, "none" not at all
    (Dr.GRPO). A group whose scores are all equal is masked and counted; one without any score is masked alone.
    """
    rewards = np.asarray(rewards, np.float64)
    scored = np.isfinite(rewards)
    count = scored.sum(1, keepdims=True)
    filled = np.where(scored, rewards, 0.0)
    mean = filled.sum(1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(scored, rewards - mean, 0.0)
    deviation = np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(count, 1))
    # All-equal scores give a deviation of rounding size, not zero, when their mean is not representable.
    highest = np.where(scored, rewards, -np.inf).max(1, keepdims=True)
    flat = highest <= np.where(scored, rewards, np.inf).min(1, keepdims=True)
    if std == "group":
        scale = deviation + EPSILON
    elif std == "global":
        scale = np.full_like(deviation, rewards[scored].std() + EPSILON if scored.any() else 1.0)
    else:
        scale = np.ones_like(deviation)
    mask = scored & ~flat
    values = np.where(mask, np.clip(centred / scale, -clip, clip), 0.0)
    return Advantages(values, mask, int((flat & (count > 0)).sum()), int((~scored).sum()))


def decoupled_rewards(
    total: NDArray[np.floating], by_scorer: Mapping[str, NDArray[np.floating]], weights: Mapping[str, float]
) -> NDArray[np.float64]:
    """Several rewards on one scale (GDPO, arXiv 2601.05242): each has mean 0 and deviation 1 within its group before
    the weighted sum, so that none is drowned by another's range, and opposite ones do not cancel unseen.

    total [B, G] is NaN for chains that do not contribute; by_scorer name -> [B, G]; weights name -> w, rewards of
    weight 0 may be left out. Returns [B, G], NaN where total is. A reward that is equal for a whole group adds 0 to it.
    """
    left_out = ~np.isfinite(total)
    combined = np.where(left_out, np.nan, 0.0)
    for name, weight in weights.items():
        combined += weight * group_advantages(np.where(left_out, np.nan, by_scorer[name]), clip=np.inf).values
    return combined
