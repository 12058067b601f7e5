"""The replicas as one generator: work goes to whoever is free, a lost replica's work goes to another."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
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
    arrived: deque[int] = field(default_factory=deque)
    stats: list[RolloutStats] = field(default_factory=list)
    error: Exception | None = None
    started: float = field(default_factory=time.monotonic)
    finished: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def finish(self, place: int, refs: list[ray.ObjectRef], stats: RolloutStats) -> None:
        with self.changed:
            self.groups[place : place + len(refs)] = refs
            self.arrived.extend(range(place, place + len(refs)))
            self.stats.append(stats)
            self.finished = time.monotonic()
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def arrivals(self, deadline_s: float) -> Iterator[tuple[int, ray.ObjectRef]]:
        """Yields (position, group reference) once each as groups become ready; RolloutError if the work failed or
        stalls."""
        for _ in self.groups:
            with self.changed:
                while not self.arrived:
                    if self.error:
                        raise RolloutError(str(self.error)) from self.error
                    if not self.changed.wait(deadline_s):
                        raise RolloutError(f"no replica finished a group for {deadline_s:.0f} s (rollout.deadline_s)")
                place = self.arrived.popleft()
            ref = self.groups[place]
            assert ref is not None
            yield place, ref

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
        self.returning = False


class RolloutPool:
    """Starts the replicas, hands out work, keeps every replica at the current weights.

    Ray tells of finished calls through futures, whose callbacks put what is to be done into one queue, which one thread
    empties. So an event costs the driver the same however many replicas there are.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.replicas = [Replica(config, i) for i in range(config.rollout.replicas)]
        self.idle: deque[Replica] = deque(self.replicas)
        self.queue: deque[Work] = deque()
        self.lock = threading.Lock()
        self.weights: tuple[WeightManifest, ray.ObjectRef] | None = None
        self.stopping = threading.Event()
        self.events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Both in the order of their times, as each has one delay for all.
        self.deadlines: deque[tuple[float, Replica, Work]] = deque()
        self.later: deque[tuple[float, Callable[[], None]]] = deque()
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
            present = [replica for replica in self.replicas if not replica.returning]
            acks = [(replica, replica.handle.load_weights.remote(manifest, buffer)) for replica in present]
        for replica, ack in acks:
            try:
                held = ray.get(ack, timeout=self.config.rollout.deadline_s)
            except RayActorError:
                self.events.put(partial(self._lost, replica))
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
        batch = Batch([None] * len(requests), [len(r.seeds) for r in requests])
        works = [Work(piece, batch, place) for place, piece in pieces]
        self.events.put(lambda: self.queue.extend(works))
        return batch

    def close(self) -> None:
        """Ends every replica."""
        self.stopping.set()
        self.events.put(lambda: None)
        if self.thread.is_alive():
            self.thread.join(timeout=5)
        for replica in self.replicas:
            ray.kill(replica.handle)

    def _run(self) -> None:
        while not self.stopping.is_set():
            with suppress(Empty):
                self.events.get(timeout=POLL_S)()
            now = time.monotonic()
            while self.later and self.later[0][0] <= now:
                self.later.popleft()[1]()
            self._check_deadlines(now)
            while self.queue and self.idle:
                self._assign(self.idle.popleft(), self.queue.popleft())

    def _then(self, ref: ray.ObjectRef, act: Callable[[ray.ObjectRef], None]) -> None:
        """Has the pool's thread act on a call's outcome once there is one."""
        ref.future().add_done_callback(lambda _: self.events.put(lambda: act(ref)))

    def _assign(self, replica: Replica, work: Work) -> None:
        call = replica.handle.generate.options(num_returns=1 + len(work.requests))
        stats, *groups = call.remote(work.requests)
        replica.work, work.started, work.attempts = work, time.monotonic(), work.attempts + 1
        self.deadlines.append((work.started + self.config.rollout.deadline_s, replica, work))
        self._then(stats, lambda outcome: self._collect(replica, work, outcome, groups))

    def _collect(self, replica: Replica, work: Work, outcome: ray.ObjectRef, groups: list[ray.ObjectRef]) -> None:
        replica.work = None
        try:
            stats = ray.get(outcome)
        except RayActorError:
            self._retry(work, f"{replica.name} died")
            self._lost(replica)
        except RayTaskError as error:
            self._retry(work, f"{replica.name}: {error.cause}")
            self.idle.append(replica)
        else:
            work.batch.finish(work.place, groups, stats)
            self.idle.append(replica)

    def _retry(self, work: Work, reason: str) -> None:
        if work.attempts >= MAX_ATTEMPTS:
            work.batch.fail(RolloutError(f"rollout failed {work.attempts} times, last: {reason}"))
            return
        log.warning("rollout work goes to another replica: %s", reason)
        self.queue.appendleft(work)

    def _lost(self, replica: Replica) -> None:
        """Ray rebuilds the actor; it rejoins once it has acknowledged the current weights."""
        with self.lock:
            if not replica.returning:
                replica.returning = True
                if replica in self.idle:
                    self.idle.remove(replica)
                arguments = self.weights
                ref = replica.handle.load_weights.remote(*arguments) if arguments else replica.handle.ping.remote()
                self._then(ref, lambda outcome: self._rejoin(replica, outcome))

    def _rejoin(self, replica: Replica, outcome: ray.ObjectRef) -> None:
        replica.returning = False
        try:
            held = ray.get(outcome)
        except (RayActorError, RayTaskError) as error:
            log.debug("%s cannot rejoin yet: %s", replica.name, error)
            # While Ray rebuilds the actor, calls to it fail at once.
            self.later.append((time.monotonic() + POLL_S, lambda: self._lost(replica)))
            return
        if self.weights and held != self.weights[0].checksum:
            # A newer version was published while it was loading.
            self._lost(replica)
        elif replica.work is None:
            self.idle.append(replica)

    def _check_deadlines(self, now: float) -> None:
        while self.deadlines and self.deadlines[0][0] <= now:
            due, replica, work = self.deadlines.popleft()
            if replica.work is work and work.started + self.config.rollout.deadline_s == due:
                log.warning("%s made no progress for %.0f s; restarting it", replica.name, now - work.started)
                ray.kill(replica.handle, no_restart=False)
