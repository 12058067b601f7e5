"""`unigrpo chaos`: a run whose actors, nodes and driver are killed at random, seeded moments, and what is left of it.

A head and a few nodes, each a raylet of its own, come up on this machine; the driver is a process that is started again
with --resume when it was killed. One kill per finished step, at a random moment of the step after it, so that every
one must be overcome before the next. At the end `deploy/chaos/check.py` looks for anything lost, done twice or left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from common.config import REPOSITORY, ConfigError, TrainConfig
from common.recipe import to_yaml
from common.rundir import RunDirectory
from deploy.chaos.check import check_left, check_run
from deploy.chaos.cluster import Cluster

KINDS = {"rollout": 0.35, "reward": 0.25, "learner": 0.2, "node": 0.1, "driver": 0.1}
"""What is killed, and how often once each kind had its turn."""
OVERRIDES = [
    "checkpoints.every=2",
    "recording.rollouts_every=1",
    "evaluation.prompts=7",
    "evaluation.images_per_prompt=2",
    "evaluation.samples=7",
]
"""Fields of a chaos run, before the user's own."""
POLL_S = 0.1
STALL_S = 1200.0


@dataclass
class Kill:
    """One kill: what, after which step was done, and the seconds until the next step was."""

    kind: str
    step: int
    at: float
    recovered_s: float | None = None


@dataclass
class Storm:
    """What happened."""

    kills: list[Kill] = field(default_factory=list)
    drivers: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    step: int = -1
    """The last step that was done, as far as anyone has looked; it never goes back."""
    moved: float = field(default_factory=time.monotonic)

    def look(self, run: RunDirectory, driver: Driver) -> bool:
        """Whether the driver still works, and how far it has come. RuntimeError if it failed, or stands still."""
        now, step = time.monotonic(), max((row["step"] for row in run.read_metrics()), default=-1)
        if step > self.step:
            self.step, self.moved = step, now
        if self.kills and self.kills[-1].recovered_s is None and self.step > self.kills[-1].step:
            self.kills[-1].recovered_s = now - self.kills[-1].at
        if now - self.moved > STALL_S:
            raise RuntimeError(f"step {self.step + 2} was not done within {STALL_S:.0f} s:\n{driver.tail()}")
        return not driver.ended()


class Driver:
    """The training process, which is resumed when it was killed."""

    def __init__(self, config: TrainConfig, scratch: Path, address: str) -> None:
        self._recipe, self.log = scratch / "recipe.yaml", scratch / "driver.log"
        self._recipe.write_text(to_yaml(config))
        self._environment = os.environ | {
            "RAY_ADDRESS": address,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.chaos.driver", str(self._recipe)],
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """SIGKILL, then a new one."""
        self.process.kill()
        self.process.wait()
        self._start()

    def ended(self) -> bool:
        """Whether it is done. RuntimeError if it failed by itself: that is a fault that the run did not survive."""
        if self.process.poll() is None:
            return False
        if self.process.returncode:
            raise RuntimeError(f"the driver ended with code {self.process.returncode}:\n{self.tail()}")
        return True

    def tail(self) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-4000:]


def schedule(kills: int, random: np.random.Generator) -> list[str]:
    """Every kind once in random order, as far as the kills go; then by weight."""
    kinds = list(KINDS)
    first = [str(kind) for kind in random.permutation(kinds)][:kills]
    return first + [str(kind) for kind in random.choice(kinds, max(0, kills - len(first)), p=list(KINDS.values()))]


def rage(config: TrainConfig, kills: int, seed: int, minutes: float, say: Callable[[str], None]) -> Storm:
    """Runs a configuration to its end while killing, at most for some minutes; what happened and every problem found.
    RuntimeError if the driver failed by itself or got no further."""
    random, run, storm = np.random.default_rng(seed), RunDirectory(config.directory), Storm()
    if run.path.exists():
        raise ConfigError(f"{run.path} exists already; give another run_name")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as scratch, _cluster(Path(scratch)) as cluster:
        driver = Driver(config, Path(scratch), cluster.address)
        try:
            for kind in schedule(kills, random):
                before = storm.step
                while (alive := storm.look(run, driver)) and storm.step <= before:
                    time.sleep(POLL_S)
                if not alive or time.monotonic() > began + 60 * minutes:
                    break
                time.sleep(float(random.uniform(0, _step_seconds(run))))
                while (alive := storm.look(run, driver)) and not _kill(kind, cluster, driver, random):
                    time.sleep(POLL_S)
                if not alive:
                    break
                storm.kills.append(Kill(kind, storm.step, time.monotonic()))
                say(f"{time.monotonic() - began:6.0f} s  step {storm.step + 1} of {config.steps} done: {kind} killed")
            while storm.look(run, driver):
                time.sleep(POLL_S)
        finally:
            driver.process.kill()
            driver.process.wait()
        storm.drivers, storm.seconds = driver.starts, time.monotonic() - began
        storm.problems = check_run(run, config) + check_left(run, cluster, Path(scratch))
    _, left = psutil.wait_procs(cluster.seen, timeout=30)
    # A long storm goes round all process ids: by now another program may have one of these.
    storm.problems += [f"process {process.pid} outlived the cluster" for process in left if process.is_running()]
    return storm


@contextmanager
def _cluster(scratch: Path) -> Iterator[Cluster]:
    os.environ["TMPDIR"] = str(scratch)  # so that what is left there is known to be the actors'
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.close()


def _kill(kind: str, cluster: Cluster, driver: Driver, random: np.random.Generator) -> bool:
    """Whether there was one to kill: what the kill before took with it may not be back."""
    if kind == "driver":
        driver.kill()
        return True
    if kind == "node":
        cluster.replace_node(random)
        return True
    return cluster.kill_actor(kind, random)


def _step_seconds(run: RunDirectory) -> float:
    return float(np.median([row["time/step_s"] for row in run.read_metrics()] or [1.0]))


def summary(storm: Storm, config: TrainConfig) -> str:
    """A Markdown table of the kills, and the verdict."""
    counts = Counter(kill.kind for kill in storm.kills)
    lines = ["| killed | times | median s to the next finished step | longest |", "|---|---|---|---|"]
    for kind in KINDS:
        waits = [k.recovered_s for k in storm.kills if k.kind == kind and k.recovered_s is not None]
        middle, longest = (f"{np.median(waits):.1f}", f"{max(waits):.1f}") if waits else ("", "")
        lines.append(f"| {kind} | {counts[kind]} | {middle} | {longest} |")
    lines.append(
        f"\n{len(storm.kills)} kills in {storm.seconds / 60:.1f} minutes, {config.steps} steps, "
        f"{storm.drivers} drivers, {len(storm.problems)} problems"
    )
    return "\n".join([*lines, *(f"- {problem}" for problem in storm.problems)])
