"""The training loop: prompts -> rollout -> rewards -> learner -> new weights -> rollout.

The driver moves references and small numbers; tensors go from actor to actor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from common.config import TrainConfig
from common.rundir import RunDirectory
from common.transport import LostWeightsError
from deploy.evaluation_run import evaluate
from deploy.in_flight import InFlight, conditions
from deploy.recovery import Recovery, redoing_lost
from deploy.refill import refill, training_rewards
from deploy.scoring import tickets
from deploy.session import Session
from deploy.step_metrics import Clock, describe
from learner.group import LostLearnerError
from rewards.pool import Scored
from rollout.batch import Batch


def train(session: Session) -> RunDirectory:
    """Runs the configured steps, from the last checkpoint if the session resumes one, or if the learner is lost."""
    recovery, first, began = Recovery(session), session.first_step, time.monotonic()
    while True:
        try:
            for step in steps(session, first, began):
                recovery.stepped(step)
            return session.run
        except (LostLearnerError, LostWeightsError) as error:
            first = recovery.after(error)


def steps(session: Session, first: int, began: float) -> Iterator[int]:
    """The algorithm; yields each step when it is done."""
    config, run = session.config, session.run
    rollout, learner = session.rollout, session.learner
    rollout.sync(learner.publish())
    if _evaluated_at(config, first) and not run.evaluation_file(first).exists():
        evaluate(session, step=first, required=False)  # before training, or cut off with the run that goes on here

    in_flight, done = InFlight(session, first), first
    recent: list[float] = []
    for step in range(first, config.steps):
        clock = Clock()
        batch = in_flight.take(step)
        scored, updated = redoing_lost(session, batch, partial(learn, session, step, batch, clock))
        with clock("sync"):
            acknowledged_s = rollout.sync(learner.publish())

        if config.recording.rollouts_every and step % config.recording.rollouts_every == 0:
            learner.record(run.rollout_file(step), batch.refs, scored.total, dict(scored.by_scorer))
        metrics = {**updated, "weights/sync_s": acknowledged_s, **describe(scored, batch, session, updated, clock)}
        session.record(step, metrics)

        done = step + 1
        recent.append(metrics["reward/mean"])
        stop = bool(config.max_minutes) and time.monotonic() - began > 60 * config.max_minutes
        last = stop or done == config.steps
        if last or (config.checkpoints.every and done % config.checkpoints.every == 0):
            state = {"step": done, "seed": config.seed, "reward": float(np.nanmean(recent))}
            learner.save(run.checkpoint(done), state | {"conditions": conditions(config)}, in_flight.finished())
            recent.clear()
        if _evaluated_at(config, done):
            evaluate(session, step=done, required=last)
        yield step
        if stop:
            break
    if not run.evaluation_file(done).exists():
        evaluate(session, step=done)
    learner.saved()


def _evaluated_at(config: TrainConfig, step: int) -> bool:
    """Whether the run is evaluated after so many steps, its last apart."""
    every = config.evaluation.every
    return step == 0 or bool(every and step % every == 0)


def learn(session: Session, step: int, batch: Batch, clock: Clock) -> tuple[Scored, dict[str, float]]:
    """Scores a step's groups as they arrive, then updates. Groups that are staler than allowed are left out."""
    with clock("rollout"):
        started = tickets(session, batch)
    with clock("reward"):
        scored = session.rewards.finish(started)
    scored, refilled = refill(session, step, batch, scored)
    staleness = session.version - np.array(batch.versions)
    stale = staleness > session.config.max_staleness
    scored.total[stale] = np.nan
    with clock("update"):
        updated = session.learner.update(step, batch.refs, training_rewards(session.config, scored))
    return scored, updated | {
        "reward/refilled_groups": float(refilled),
        "rollout/staleness": float(staleness.mean()),
        "rollout/stale_groups": float(stale.sum()),
    }
