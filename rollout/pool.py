"""The replicas as one generator: work goes to whoever is free, a lost replica's work goes to another."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from common.config import TrainConfig
from common.runtime import thread_env
from common.types import RolloutRequest, RolloutStats, WeightManifest
from rollout.actor import RolloutReplica

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 3
POLL_S = 0.2


class RolloutError(RuntimeError):
    """Rollout work that could not be done."""


@dataclass
class Work:
    """Requests that one replica generates together, and what came of them."""

    requests: list[RolloutRequest]
    batch: Batch
    place: int
    attempts: int = 0
    started: float = 0.0


@dataclass
class Batch:
    """One training step's (or one evaluation's) groups: filled as replicas finish."""

    groups: list[ray.ObjectRef | None]
    sizes: list[int]
    open: int
    stats: list[RolloutStats] = field(default_factory=list)
    error: Exception | None = None
    started: float = field(default_factory=time.monotonic)
    finished: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def finish(self, place: int, refs: list[ray.ObjectRef], stats: RolloutStats) -> None:
        with self.changed:
            self.groups[place : place + len(refs)] = refs
            self.stats.append(stats)
            self.open -= 1
            self.finished = time.monotonic()
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def arrivals(self, deadline_s: float) -> Any:
        """Yields (position, group reference) as groups become ready; RolloutError if the work failed or stalls."""
        given: set[int] = set()
        while len(given) < len(self.groups):
            with self.changed:
                ready = [i for i, ref in enumerate(self.groups) if ref is not None and i not in given]
                if not ready:
                    if self.error:
                        raise RolloutError(str(self.error)) from self.error
                    if not self.changed.wait(deadline_s):
                        raise RolloutError(f"no replica finished a group for {deadline_s:.0f} s (rollout.deadline_s)")
                    continue
            for i in ready:
                given.add(i)
                yield i, self.groups[i]

    @property
    def refs(self) -> list[ray.ObjectRef]:
        """The groups in the order of the requests, once all have arrived."""
        return [ref for ref in self.groups if ref is not None]

    @property
    def seconds(self) -> float:
        return self.finished - self.started


class Replica:
    """The driver's view of one replica."""

    def __init__(self, config: TrainConfig, index: int) -> None:
        self.name = f"rollout-{index}"
        resources = config.rollout
        self.handle: Any = (
            ray.remote(RolloutReplica)
            .options(
                name=f"{config.run_name}-{self.name}",
                num_cpus=resources.cpus,
                num_gpus=resources.gpus * resources.tensor_parallel,
                resources=resources.custom,
                max_restarts=-1,
                runtime_env={"env_vars": thread_env(resources.cpus)},
            )
            .remote(config)
        )
        self.work: Work | None = None
        self.stats_ref: ray.ObjectRef | None = None
        self.refs: list[ray.ObjectRef] = []
        self.returning: ray.ObjectRef | None = None


class RolloutPool:
    """Starts the replicas, hands out work, keeps every replica at the current weights."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.replicas = [Replica(config, i) for i in range(config.rollout.replicas)]
        self.queue: deque[Work] = deque()
        self.lock = threading.Lock()
        self.weights: tuple[WeightManifest, ray.ObjectRef] | None = None
        self.stopping = threading.Event()
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self._run, name="rollout-pool", daemon=True)

    def wait_ready(self) -> None:
        """Blocks until every replica is built. RolloutError after the deadline, naming what it waited for."""
        deadline = time.monotonic() + self.config.rollout.deadline_s
        for replica in self.replicas:
            try:
                ray.get(replica.handle.ping.remote(), timeout=max(1.0, deadline - time.monotonic()))
            except ray.exceptions.GetTimeoutError as error:
                raise RolloutError(
                    f"{replica.name} was not ready after {self.config.rollout.deadline_s:.0f} s (rollout.deadline_s)"
                ) from error
        self.thread.start()

    def sync(self, manifest: WeightManifest, buffer: ray.ObjectRef) -> float:
        """Sends a version to every replica and waits until each has acknowledged its checksum; seconds taken.

        A replica that is generating loads the version after the call it is in.
        """
        started = time.monotonic()
        with self.lock:
            self.weights = (manifest, buffer)
            present = [replica for replica in self.replicas if replica.returning is None]
            acks = [(replica, replica.handle.load_weights.remote(manifest, buffer)) for replica in present]
        for replica, ack in acks:
            try:
                held = ray.get(ack, timeout=self.config.rollout.deadline_s)
            except RayActorError:
                self._lost(replica)
                continue
            except ray.exceptions.GetTimeoutError as error:
                raise RolloutError(
                    f"{replica.name} did not acknowledge weights version {manifest.version} within "
                    f"{self.config.rollout.deadline_s:.0f} s (rollout.deadline_s)"
                ) from error
            if held != manifest.checksum:
                raise RolloutError(f"{replica.name} holds {held} instead of {manifest.checksum}")
        return time.monotonic() - started

    def submit(self, requests: list[RolloutRequest]) -> Batch:
        """Queues groups; returns at once."""
        size = self.config.rollout.groups_per_call
        pieces = [(i, requests[i : i + size]) for i in range(0, len(requests), size)]
        batch = Batch([None] * len(requests), [len(r.seeds) for r in requests], len(pieces))
        with self.lock:
            self.queue.extend(Work(piece, batch, place) for place, piece in pieces)
        self.wake.set()
        return batch

    def close(self) -> None:
        """Ends every replica."""
        self.stopping.set()
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)
        for replica in self.replicas:
            ray.kill(replica.handle)

    def _run(self) -> None:
        while not self.stopping.is_set():
            with self.lock:
                for replica in self.replicas:
                    if replica.work is None and replica.returning is None and self.queue:
                        self._assign(replica, self.queue.popleft())
                waiting = {r.stats_ref: r for r in self.replicas if r.stats_ref is not None}
                returning = {r.returning: r for r in self.replicas if r.returning is not None}
            refs = [*waiting, *returning]
            if not refs:
                self.wake.wait(POLL_S)
                self.wake.clear()
                continue
            done, _ = ray.wait(refs, num_returns=1, timeout=POLL_S)
            for ref in done:
                if ref in waiting:
                    self._collect(waiting[ref])
                else:
                    self._rejoin(returning[ref])
            self._check_deadlines()

    def _assign(self, replica: Replica, work: Work) -> None:
        call = replica.handle.generate.options(num_returns=1 + len(work.requests))
        replica.stats_ref, *replica.refs = call.remote(work.requests)
        replica.work, work.started, work.attempts = work, time.monotonic(), work.attempts + 1

    def _collect(self, replica: Replica) -> None:
        work, stats_ref, refs = replica.work, replica.stats_ref, replica.refs
        assert work is not None and stats_ref is not None
        replica.work, replica.stats_ref, replica.refs = None, None, []
        try:
            stats = ray.get(stats_ref)
        except RayActorError:
            self._retry(work, f"{replica.name} died")
            self._lost(replica)
        except RayTaskError as error:
            self._retry(work, f"{replica.name}: {error.cause}")
        else:
            work.batch.finish(work.place, refs, stats)

    def _retry(self, work: Work, reason: str) -> None:
        if work.attempts >= MAX_ATTEMPTS:
            work.batch.fail(RolloutError(f"rollout failed {work.attempts} times, last: {reason}"))
            return
        log.warning("rollout work goes to another replica: %s", reason)
        with self.lock:
            self.queue.appendleft(work)

    def _lost(self, replica: Replica) -> None:
        """Ray rebuilds the actor; it rejoins once it has acknowledged the current weights."""
        with self.lock:
            if replica.returning is None:
                arguments = self.weights
                replica.returning = (
                    replica.handle.load_weights.remote(*arguments) if arguments else replica.handle.ping.remote()
                )

    def _rejoin(self, replica: Replica) -> None:
        ref, replica.returning = replica.returning, None
        assert ref is not None
        try:
            held = ray.get(ref)
        except (RayActorError, RayTaskError) as error:
            log.debug("%s cannot rejoin yet: %s", replica.name, error)
            self.stopping.wait(POLL_S)  # while Ray rebuilds the actor, calls to it fail at once
            self._lost(replica)
            return
        if self.weights and held != self.weights[0].checksum:
            # A newer version was published while it was loading.
            self._lost(replica)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for replica in self.replicas:
            if replica.work and now - replica.work.started > self.config.rollout.deadline_s:
                log.warning("%s made no progress for %.0f s; restarting it", replica.name, now - replica.work.started)
                ray.kill(replica.handle, no_restart=False)
                replica.work.started = now
