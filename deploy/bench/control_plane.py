"""`python -m deploy.bench.control_plane [REPLICAS ...] [--seconds S]`: what driving many replicas costs, as a Markdown
table.

The driver's code is the real one: rollout pool, batches, requests, weight publications, reward pool and reward actors.
What stands in for engines is simulated: `SimulatedHost` is one process that plays many replicas, which sleep as long as
a real one would work and return groups of 24 chains whose arrays have the sizes of the default recipe's;
`SimulatedScorer` sleeps in a real reward actor. The learner takes no part: a version is a manifest with as many names
as one of a 7B mixture of transformers, and loading it takes no time.

CPU per group is told by who spent it: driver, reward actors, Ray's own processes, simulated engines. On a cluster only
the first is on the driver's machine; here all share it. Efficiency is the makespan of the same jobs, in the same order,
on replicas that cost nothing to drive, over the measured one. The queueing delay of a replica is the time between the
end of a call and the begin of its next, both read in the simulated engine.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import logging
import os
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray

from common.bagel.config import BagelConfig
from common.config import Section, TrainConfig, resolve_path
from common.prompts import PromptOrder, read_prompts
from common.recipe import load_config
from common.transport.object_store import ObjectStorePublication
from common.types import Chain, Group, ImageSegment, RolloutRequest, RolloutStats, TextSegment, WeightBucket
from common.types import WeightManifest as Manifest
from deploy.local_ray import start_ray
from deploy.requests import training_requests
from rewards.pool import RewardPool
from rewards.scorer import Scorer, ScorerOutput
from rollout.pool import RolloutPool
from rollout.replica import Replica

SIZES = (8, 64, 256, 1000)
GROUP, CALL_S, SPREAD = 24, 10.0, 0.2
ROUNDS, PER_HOST, TENSORS = 4, 250, 1200
SCORE_S = 0.05


def call_seconds(request: RolloutRequest, mean: float = CALL_S) -> float:
    """How long a group takes, 10 s and up to 20 % more or less, the same wherever it is made."""
    return mean * (1 + SPREAD * (2 * (request.seeds[0] % 1009) / 1008 - 1))


class SimulatedHost:
    """Many simulated replicas in one process. Not an engine: it sleeps and returns noise of the right shapes."""

    def __init__(self, tokens: int, latents: tuple[int, int, int], pixels: tuple[int, int, int], call_s: float) -> None:
        """latents [K, N, D] of a chain's window; call_s: mean seconds of a group, of which half are reasoning."""
        noise = np.zeros(latents, np.float32)
        ids, times = np.zeros(tokens, np.int64), np.zeros(latents[0], np.float32)
        text = TextSegment(ids, ids, np.zeros(tokens, np.float32), True, "", 0)
        image = ImageSegment(noise, noise, noise, times, times, np.zeros(pixels, np.uint8), (1, latents[1]), 0)
        self._chain, self._call_s = (text, image), call_s
        self._calls: dict[int, list[tuple[float, float]]] = {}
        self._held: dict[int, int] = {}
        self._pauses: dict[int, asyncio.Event] = {}

    async def ping(self, replica: int) -> str:
        return "first start"

    async def load_weights(self, replica: int, manifest: Manifest, ticket: Any) -> str:
        self._held[replica] = manifest.version
        return manifest.checksum

    async def pause(self, replica: int, version: int) -> None:
        if replica in self._pauses:
            self._pauses[replica].set()

    async def generate(
        self, replica: int, requests: list[RolloutRequest], paused: tuple[float, int] | None, holding: int
    ) -> tuple[RolloutStats | Group | tuple[float, int] | None, ...]:
        """paused: the seconds that were reasoned before a pause, and by which version; holding is what it holds."""
        begun, (reasoned, version) = time.monotonic(), paused or (0.0, self._held[replica])
        half = sum(call_seconds(request, self._call_s) for request in requests) / 2
        self._pauses[replica] = pause = asyncio.Event()
        with suppress(TimeoutError):
            await asyncio.wait_for(pause.wait(), half - reasoned)
            return None, (reasoned + time.monotonic() - begun, version), *[None] * (len(requests) - 1)
        await asyncio.sleep(half)
        groups = [Group(r.prompt, r.step, tuple(self._copy(seed) for seed in r.seeds)) for r in requests]
        self._calls.setdefault(replica, []).append((begun, time.monotonic()))
        chains = sum(len(group.chains) for group in groups)
        tokens = chains * len(self._chain[0].ids)
        return RolloutStats(version, chains, tokens, 0, half, half, time.time() - 2 * half), *groups

    def _copy(self, seed: int) -> Chain:
        """Arrays of its own, so that each is serialised."""
        text, image = self._chain
        arrays = {name: getattr(image, name).copy() for name in ("x_t", "x_next", "v_old", "pixels")}
        return Chain((text, replace(image, **arrays)), seed)

    async def delays(self) -> list[float]:
        """Seconds between calls of every replica."""
        return [after[0] - before[1] for calls in self._calls.values() for before, after in pairwise(calls)]


@dataclass
class SimulatedHandle:
    """One replica of a host, called as the handle of an actor is."""

    host: Any
    index: int

    def __getattr__(self, method: str) -> SimulatedMethod:
        return SimulatedMethod(getattr(self.host, method), self.index)


@dataclass
class SimulatedMethod:
    """A method of such a handle."""

    method: Any
    index: int

    def options(self, concurrency_group: str = "", **options: Any) -> SimulatedMethod:
        """A host hears everything beside everything else anyway."""
        return SimulatedMethod(self.method.options(**options), self.index)

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.index, *arguments)


class SimulatedReplica(Replica):
    """The driver's side is the real one, but for placement: a host is started before."""

    hosts: list[Any]

    def start(self, config: TrainConfig) -> Any:
        index = int(self.name.rpartition("-")[2])
        return SimulatedHandle(self.hosts[index % len(self.hosts)], index)

    def has_room(self) -> bool:
        return True

    def restart(self) -> None:
        raise RuntimeError(f"{self.name} is simulated and does not fail")

    def end(self) -> None:
        pass


class SimulatedScorer(Scorer):
    """Takes its time in a real reward actor."""

    def __init__(self, options: Section) -> None:
        pass

    def score(self, images: NDArray[np.uint8], prompts: list[Any]) -> ScorerOutput:
        time.sleep(SCORE_S)
        return ScorerOutput(images.reshape(len(images), -1)[:, 0].astype(np.float32))


def configuration(replicas: int, call_s: float = CALL_S) -> TrainConfig:
    """The default recipe with groups of 24; a step gives every replica one group."""
    scorers = max(1, round(1.5 * replicas / call_s * SCORE_S))
    config = load_config(
        "shapes",
        [f"run_name=bench-{replicas}", f"data.group_size={GROUP}", "rollout.groups_per_call=1", "learner.ranks=1",
         f"rollout.replicas={replicas}", "data.prompts_per_step=1"],
    )  # fmt: skip
    scorer = config.rewards[0].model_copy(
        update={"name": "deploy.bench.control_plane:SimulatedScorer", "replicas": scorers, "cpus": 0.0, "weight": 1.0}
    )
    data = config.data.model_copy(update={"prompts_per_step": replicas})
    return config.model_copy(update={"data": data, "rewards": (scorer,)})


def publication(version: int) -> ObjectStorePublication:
    """A version as large in names as one of a 7B mixture of transformers."""
    names = [f"language_model.model.layers.{i // 40}.self_attn.q_proj_moe_gen.weight.{i}" for i in range(TENSORS)]
    cuts = [names[i : i + 20] for i in range(0, TENSORS, 20)]
    buckets = tuple(WeightBucket(tuple(c), ((3584, 3584),) * len(c), tuple(range(len(c)))) for c in cuts)
    return ObjectStorePublication(Manifest(version, "bfloat16", buckets), [ray.put(b"") for _ in buckets])


def ideal_seconds(durations: list[float], replicas: int) -> float:
    """Makespan of the jobs in order on replicas that take the next one at once."""
    free = [0.0] * replicas
    for seconds in durations:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def hosts(config: TrainConfig, replicas: int, call_s: float = CALL_S) -> tuple[list[Any], type[Replica]]:
    """Processes that play so many replicas, and what a pool makes its replicas of."""
    host: Any = ray.remote(SimulatedHost).options(num_cpus=0, max_concurrency=2 * PER_HOST)
    model = BagelConfig.read(resolve_path(config.model.path))
    rows, columns = model.grid(config.model.height, config.model.width)
    latents = (config.sampling.window_size, rows * columns, model.token_dim)
    pixels = (config.model.height, config.model.width, 3)
    number = -(-replicas // PER_HOST)
    found = [host.remote(config.sampling.max_tokens, latents, pixels, call_s) for _ in range(number)]
    return found, type("HostedReplica", (SimulatedReplica,), {"hosts": found})


WHOSE = {"ray::RewardActor": "rewards", "ray::SimulatedHost": "engines"}


def cpu_seconds() -> dict[str, float]:
    """CPU time so far of the driver, of the actors by kind, and of Ray's own processes."""
    spent = defaultdict(float, driver=time.process_time())
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            times, title = process.cpu_times(), " ".join(process.cmdline())
            whose = next((who for start, who in WHOSE.items() if title.startswith(start)), "ray")
            spent[whose] += times.user + times.system
    return spent


def measure(replicas: int, call_s: float = CALL_S) -> dict[str, float]:
    """A few rounds of one group per replica, the next round queued before the last has ended."""
    config = configuration(replicas, call_s)
    order = PromptOrder(read_prompts(resolve_path(config.data.train)), replicas, 0)
    players, pool_type = hosts(config, replicas, call_s)
    pool = RolloutPool(config, replica_type=pool_type)
    rewards = RewardPool(config.rewards, config.run_name)
    try:
        pool.wait_ready()
        while pool.serving < replicas:
            time.sleep(0.1)
        sync_s = min(pool.sync(publication(version)) for version in range(2))
        requests = [training_requests(config, order, step) for step in range(ROUNDS)]
        before, started = cpu_seconds(), time.monotonic()
        batches = [pool.submit(step) for step in requests]
        for batch in batches:
            tickets = [rewards.start(ref, GROUP) for _, ref in batch.arrivals(config.rollout.deadline_s)]
            rewards.finish(tickets)
            batch.groups.clear()
        wall, spent = max(b.finished for b in batches) - started, cpu_seconds()
        delays = np.concatenate(ray.get([host.delays.remote() for host in players]))
    finally:
        rewards.close()
        pool.close()
        for host in players:
            ray.kill(host)
    durations = [call_seconds(request, call_s) for step in requests for request in step]
    return {
        "groups": len(durations),
        **{whose: 1000 * (spent[whose] - before[whose]) / len(durations) for whose in spent},
        "delay_ms": 1000 * float(np.median(delays)),
        "delay99_ms": 1000 * float(np.quantile(delays, 0.99)),
        "efficiency": ideal_seconds(durations, replicas) / wall,
        "sync_s": sync_s,
    }


def main() -> None:
    """Prints one row for each number of replicas."""
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.control_plane")
    parser.add_argument("replicas", nargs="*", type=int, default=SIZES)
    parser.add_argument("--seconds", type=float, default=CALL_S, help="mean time of a group")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    start_ray(2, object_store_memory=2 << 30)
    print(
        "| replicas | s a group | groups | efficiency | queueing delay, median | 99 % | publish to all "
        "| CPU per group: driver | reward actors | Ray | simulated engines |\n" + "|---" * 11 + "|"
    )
    for replicas in asked.replicas:
        row = measure(replicas, asked.seconds)
        print(
            f"| {replicas} | {asked.seconds:g} | {row['groups']} | {row['efficiency']:.3f} | {row['delay_ms']:.0f} ms "
            f"| {row['delay99_ms']:.0f} ms | {row['sync_s']:.2f} s | {row['driver']:.2f} ms | {row['rewards']:.2f} ms "
            f"| {row['ray']:.2f} ms | {row['engines']:.2f} ms |",
            flush=True,
        )
    print(f"\n{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    ray.shutdown()


if __name__ == "__main__":
    main()
