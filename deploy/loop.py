"""The training loop: prompts -> rollout -> rewards -> learner -> new weights -> rollout.

The driver moves references and small numbers; tensors go from actor to actor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from common.rundir import RunDirectory
from deploy.evaluation_run import evaluate
from deploy.requests import training_requests
from deploy.session import Session
from rewards.pool import Scored
from rollout.pool import Batch


def train(session: Session) -> RunDirectory:
    """Runs the configured steps, from the last checkpoint if the session resumes one."""
    config, run = session.config, session.run
    rollout, rewards, learner = session.rollout, session.rewards, session.learner
    rollout.sync(*learner.publish())
    if session.first_step == 0:
        evaluate(session, step=0)

    in_flight: deque[Batch] = deque()
    submitted = done = session.first_step
    began = time.monotonic()
    for step in range(session.first_step, config.steps):
        clock = Clock()
        while submitted <= min(step + config.max_staleness, config.steps - 1):
            in_flight.append(rollout.submit(training_requests(config, session.order, submitted)))
            submitted += 1
        batch = in_flight.popleft()

        with clock("rollout"):
            arrivals = batch.arrivals(config.rollout.deadline_s)
            tickets = dict(sorted((place, rewards.start(ref, batch.sizes[place])) for place, ref in arrivals))
        with clock("reward"):
            scored = rewards.finish(list(tickets.values()))
        with clock("update"):
            updated = learner.update(step, batch.refs, scored.total)
        with clock("sync"):
            rollout.sync(*learner.publish())

        if config.recording.rollouts_every and step % config.recording.rollouts_every == 0:
            learner.record(run.rollout_file(step, 0), batch.refs, scored.total, dict(scored.by_scorer))
        metrics = {**updated, **_describe(scored, batch, rollout.metrics(), updated, clock)}
        session.trackers.log(step, metrics)
        session.progress.update(step, metrics)

        done = step + 1
        stop = bool(config.max_minutes) and time.monotonic() - began > 60 * config.max_minutes
        last = stop or done == config.steps
        if last or (config.checkpoints.every and done % config.checkpoints.every == 0):
            learner.save(run.checkpoint(done), {"step": done, "seed": config.seed})
        if config.evaluation.every and done % config.evaluation.every == 0:
            evaluate(session, step=done)
        if stop:
            break
    if not run.evaluation_file(done).exists():
        evaluate(session, step=done)
    return run


class Clock:
    """Seconds of a step by phase."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.phases[phase] = time.monotonic() - before

    @property
    def total(self) -> float:
        return time.monotonic() - self.started


def _describe(
    scored: Scored, batch: Batch, pool: dict[str, float], updated: dict[str, float], clock: Clock
) -> dict[str, float]:
    """The step's numbers that the driver knows. Overhead is what remains of the step beside model mathematics."""
    total, step_s, replicas = scored.total, clock.total, max(1.0, pool["rollout/replicas"])
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
        **pool,
        "text/tokens_mean": tokens / max(chains, 1),
        "rollout/images_per_s": chains / batch.seconds,
        "rollout/tokens_per_s": tokens / max(sum(s.reasoning_s for s in batch.stats) / replicas, 1e-9),
        "weights/sync_s": clock.phases["sync"],
        "time/step_s": step_s,
        "time/overhead_fraction": max(0.0, 1 - (generating + updated["time/update_math_s"]) / step_s),
        **{f"time/{phase}_s": seconds for phase, seconds in clock.phases.items()},
    }
