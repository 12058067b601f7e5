"""What the driver knows of a training step: how long each phase took, what was made, and how it was scored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from common.timeline import timed
from deploy.session import Session
from rewards.pool import Scored
from rollout.batch import Batch


class Clock:
    """Seconds of a step by phase."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = time.monotonic()
        with timed("driver", phase):
            yield
        self.phases[phase] = time.monotonic() - before

    @property
    def total(self) -> float:
        return time.monotonic() - self.started


def describe(
    scored: Scored, batch: Batch, session: Session, updated: dict[str, float], clock: Clock
) -> dict[str, float]:
    """The step's numbers that the driver knows. Overhead is what remains of the step beside model mathematics."""
    supervised = session.rollout.metrics() | session.learner.metrics() | session.rewards.metrics()
    total, step_s, replicas = scored.total, clock.total, max(1.0, supervised["rollout/replicas"])
    chains, tokens = sum(s.chains for s in batch.stats), sum(s.tokens for s in batch.stats)
    generating = sum(s.reasoning_s + s.drawing_s for s in batch.stats) / replicas
    spread = {f"reward/{name}": float(np.nanmean(values)) for name, values in scored.by_scorer.items()}
    extra = {f"reward/{name}": float(np.nanmean(values)) for name, values in scored.components.items()}
    return {
        "reward/mean": float(np.nanmean(total)),
        "reward/std": float(np.nanstd(total)),
        "reward/nonfinite": float(scored.nonfinite),
        **spread,
        **extra,
        **supervised,
        "text/tokens_mean": tokens / max(chains, 1),
        "text/truncated": sum(s.truncated for s in batch.stats) / max(chains, 1),
        "rollout/images_per_s": batch.images_per_s,
        "rollout/tokens_per_s": tokens / max(sum(s.reasoning_s for s in batch.stats) / replicas, 1e-9),
        "time/reasoning_s": sum(s.reasoning_s for s in batch.stats) / replicas,
        "time/drawing_s": sum(s.drawing_s for s in batch.stats) / replicas,
        "time/step_s": step_s,
        "time/overhead_fraction": max(0.0, 1 - (generating + updated["time/update_math_s"]) / step_s),
        **{f"time/{phase}_s": seconds for phase, seconds in clock.phases.items()},
    }
