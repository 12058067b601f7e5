"""Group-relative advantages (paper section 3; Dr.GRPO and global-std variants)."""

from __future__ import annotations

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
    (Dr.GRPO). A group whose scores are all equal is masked and counted.
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
    return Advantages(values, mask, int(flat.sum()), int((~scored).sum()))
