"""`python -m deploy.bench.overlap [STEPS]`: a step with rollouts before the update and beside it, as Markdown tables.

First the loop's own phases with simulated engines and a simulated learner, which sleep: what overlap gains where
rollout and learner have processors of their own. Then the default recipe with real engines, one replica and one learner
rank, at max_staleness 0 and 1 one after the other, and the learning curves of both (docs/overlap/curves.png).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from matplotlib.figure import Figure

from common.config import REPOSITORY, TrainConfig, resolve_path
from common.prompts import PromptOrder, read_prompts
from common.recipe import load_config
from common.transport.object_store import ObjectStorePublication
from deploy.bench import control_plane as simulated
from deploy.in_flight import InFlight
from deploy.local_ray import start_ray
from deploy.loop import learn, train
from deploy.session import open_session
from deploy.step_metrics import Clock
from rewards.pool import RewardPool
from rollout.pool import RolloutPool

STEPS, WARM, SMOOTH = 60, 3, 9
KEYS = ("time/step_s", "time/rollout_s", "time/update_s", "time/sync_s", "rollout/staleness")
CURVES = REPOSITORY / "docs" / "overlap" / "curves.png"
REPLICAS, CALL_S, UPDATE_S, SIMULATED_STEPS = 16, 2.0, 1.5, 12


class SimulatedLearner:
    """Not a learner: sleeps as long as an update, and counts versions."""

    def __init__(self) -> None:
        self.version = 0

    def update(self, step: int, groups: list[Any], rewards: Any) -> dict[str, float]:
        time.sleep(UPDATE_S)
        self.version += 1
        return {}

    def publish(self) -> ObjectStorePublication:
        return simulated.publication(self.version)


def measure_simulated(staleness: int) -> dict[str, float]:
    """Medians over steps of the real pools, requests and phases of the loop around simulated engines."""
    config: TrainConfig = simulated.configuration(REPLICAS).model_copy(update={"max_staleness": staleness})
    config = config.model_copy(update={"steps": SIMULATED_STEPS})
    order = PromptOrder(read_prompts(resolve_path(config.data.train)), REPLICAS, 0)
    hosts, pool_type = simulated.hosts(config, REPLICAS, CALL_S)
    pool, rewards = RolloutPool(config, replica_type=pool_type), RewardPool(config.rewards, config.run_name)
    learner: Any = SimulatedLearner()
    # Everything of a session that the phases ask for.
    session: Any = SimpleNamespace(config=config, order=order, rollout=pool, rewards=rewards, learner=learner)
    session.run = SimpleNamespace(checkpoint=lambda step: Path("/nowhere"))
    rows = []
    try:
        pool.wait_ready()
        pool.sync(learner.publish())
        in_flight = InFlight(session, 0)
        for step in range(SIMULATED_STEPS):
            clock, session.version = Clock(), learner.version
            _, metrics = learn(session, step, in_flight.take(step), clock)
            with clock("sync"):
                pool.sync(learner.publish())
            phases = {f"time/{phase}_s": seconds for phase, seconds in clock.phases.items()}
            rows.append({**phases, "time/step_s": clock.total, **metrics})
    finally:
        rewards.close()
        pool.close()
        for host in hosts:
            ray.kill(host)
    return medians(rows)


def measure(staleness: int, steps: int) -> list[dict[str, Any]]:
    """The metrics of every step of a short run of the default recipe."""
    with tempfile.TemporaryDirectory() as runs, redirect_stdout(sys.stderr):
        # A core for the replica and one for the learner, so that there is something to overlap.
        overrides = ["rollout.replicas=1", "learner.ranks=1", "rollout.groups_per_call=2", "evaluation.prompts=7"]
        run = [f"steps={steps}", f"runs_dir={runs}", f"run_name=overlap-{staleness}", f"max_staleness={staleness}"]
        with open_session(load_config("shapes", [*overrides, *run])) as session:
            return train(session).read_metrics()


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of what the table shows, the first steps left out."""
    return {key: float(np.median([row[key] for row in rows[WARM:]])) for key in KEYS}


def table(title: str) -> None:
    print(f"\n{title}\n\n| max_staleness | step | waiting for rollouts | update | sync | mean staleness |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)


def row(staleness: int, found: dict[str, float]) -> None:
    step, *phases, behind = found.values()
    print(f"| {staleness} | {step:.2f} s | {' | '.join(f'{s:.2f} s' for s in phases)} | {behind:.2f} |", flush=True)


def draw(runs: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Reward by step and by time, as moving means."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for staleness, rows in runs.items():
        reward = np.convolve([row["reward/mean"] for row in rows], np.ones(SMOOTH) / SMOOTH, "valid")
        minutes = np.cumsum([row["time/step_s"] for row in rows])[SMOOTH - 1 :] / 60
        by_step.plot(np.arange(SMOOTH, len(rows) + 1), reward, label=f"max_staleness={staleness}")
        by_time.plot(minutes, reward)
    by_step.set(xlabel="step", ylabel=f"training reward, mean of {SMOOTH} steps")
    by_time.set(xlabel="minutes")
    by_step.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints both tables and writes the curves."""
    start_ray(2)
    table(f"Simulated: {REPLICAS} replicas, {CALL_S:g} s a group, {UPDATE_S:g} s an update")
    for staleness in (0, 1):
        row(staleness, measure_simulated(staleness))
    ray.shutdown()
    steps, runs = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS, {}
    table(f"Real: the default recipe, {steps} steps, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    for staleness in (0, 1):
        runs[staleness] = measure(staleness, steps)
        row(staleness, medians(runs[staleness]))
    draw(runs, CURVES)


if __name__ == "__main__":
    main()
