"""The SDE window: which contiguous steps of the schedule are stochastic and trained."""

from __future__ import annotations

import numpy as np


def sample_window(seed: int, size: int, span: tuple[int, int], steps: int) -> tuple[int, int]:
    """(first step, size): the first is uniform in [low, high - size], both ends included, drawn once per group.

    ValueError if the window does not fit the schedule.
    """
    low, high = span
    first = int(np.random.default_rng(seed).integers(low, high - size + 1))
    if first + size > steps:
        raise ValueError(f"SDE window {first}..{first + size} lies outside the {steps} steps of the schedule")
    return first, size


def sliding_window(moves: int, size: int, span: tuple[int, int]) -> tuple[int, int]:
    """(first step, size) of a window that slides from the start of its range, one step a move, and stays at the end
    (MixGRPO's progressive strategy)."""
    low, high = span
    return min(low + moves, high - size), size
