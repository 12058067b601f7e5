"""The replicas as one generator: work goes to whoever is free, a lost replica's work goes to another.

A thread of the driver supervises: it alone calls replicas. What a free replica does next depends on its state alone:
it leaves, loads the version last published, takes work, or waits. So none generates with weights that it was not given
and acknowledged, whether it was there from the start, was restarted, or joined a minute ago.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from common.actors import last_line, not_built
from common.config import ConfigError, TrainConfig
from common.events import event
from common.runtime import one_line
from common.timeline import span
from common.transport import LostWeightsError, Publication, TransportError
from common.types import RolloutRequest, RolloutStats
from rollout.actor import ForgottenWeightsError
from rollout.batch import Batch, FollowUp, RolloutError, Work
from rollout.faults import Faults
from rollout.replica import STATES, Call, Replica
from rollout.scaling import first_to_go, wanted

log = logging.getLogger(__name__)
MAX_ERRORS = 3  # of one piece of work
MAX_DEATHS = 10  # of replicas over one piece of work
TICK_S = 0.2


class RolloutPool:
    """Starts the replicas, hands out work, keeps every replica at the current weights, grows and shrinks."""

    def __init__(self, config: TrainConfig, replicas: int | None = None, replica_type: type[Replica] = Replica) -> None:
        """replicas: how many to start with, rollout.replicas if None."""
        self.config, self._replica_type = config, replica_type
        self.fewest, self.most = config.replica_bounds
        self.replicas: list[Replica] = []
        self.weights: Publication | None = None
        self._manifest: ray.ObjectRef | None = None
        self._awaited: Replica | None = None
        self.restarts = self.rerun_groups = self.continued_groups = 0
        self._faults = Faults()
        self._orphaned: LostWeightsError | None = None
        self._started = 0
        self._queue: deque[Work] = deque()
        self._events: queue.SimpleQueue[tuple[Replica, Call] | None] = queue.SimpleQueue()
        self._changed = threading.Condition(threading.RLock())  # guards everything here
        self._broken: Exception | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rollout-pool", daemon=True)
        if replicas is not None:
            self.scale(replicas)
        for _ in range(replicas or config.rollout.replicas):
            self._add()
        self._thread.start()

    def wait_ready(self) -> None:
        """Blocks until the fewest replicas are built. After the deadline ConfigError if the cluster has no room for
        them, RolloutError if they are still being built."""
        wait_s, enough = self.config.rollout.deadline_s, min(self.fewest, self.config.replica_bounds[0])
        with self._changed:
            if self._changed.wait_for(lambda: self._broken or self.serving >= enough, wait_s):
                if self._broken:
                    raise self._broken
                return
            late = ", ".join(replica.name for replica in self.replicas if not replica.serving)
        if roomless := self._roomless():
            raise roomless
        raise RolloutError(
            f"{self.serving} of {enough} rollout replicas were ready after {wait_s:.0f} s (rollout.deadline_s); "
            f"{late}: still being built"
        )

    def _roomless(self) -> ConfigError | None:
        """What to say if replicas wait for room."""
        with self._changed:
            waiting = [replica for replica in self.replicas if not replica.serving and not replica.has_room()]
        if not waiting:
            return None
        names = ", ".join(replica.name for replica in waiting)
        return waiting[0].room.missing(names, f"{self.config.rollout.deadline_s:.0f} s (rollout.deadline_s)")

    @property
    def serving(self) -> int:
        """Replicas that are up and stay."""
        return sum(replica.serving and not replica.leaving for replica in self.replicas)

    def metrics(self) -> dict[str, float]:
        """How many replicas serve, are wanted, and are in each state; restarts, and groups that were generated again or
        went on after a pause, since the start; groups that wait for a replica."""
        with self._changed:
            doing = Counter(replica.state for replica in self.replicas)
            return {
                **{f"rollout/{state}": float(doing[state]) for state in STATES},
                "rollout/replicas": float(self.serving),
                "rollout/replicas_wanted": float(sum(not replica.leaving for replica in self.replicas)),
                "rollout/restarts": float(self.restarts),
                "rollout/rerun_groups": float(self.rerun_groups),
                "rollout/continued_groups": float(self.continued_groups),
                "rollout/queued_groups": float(sum(len(work.requests) for work in self._queue)),
            }

    def states(self) -> dict[str, str]:
        """What every replica does, by name."""
        with self._changed:
            return {replica.name: replica.state for replica in self.replicas}

    def scale(self, replicas: int) -> None:
        """Holds the pool at a number of replicas: new ones join when built, surplus ones leave after their work."""
        with self._changed:
            self.fewest = self.most = replicas
        self._events.put(None)

    def sync(self, weights: Publication) -> float:
        """Publishes a version to every replica and waits until all that serve have acknowledged its checksum; seconds.

        A replica that is generating loads the version after the call it is in, which `max_staleness` has pause between
        two tokens; one that is lost meanwhile, before it works again.
        """
        started = time.monotonic()
        with self._changed:
            self.weights, self._manifest = weights, ray.put(weights.manifest)
            self._orphaned = None
            self._faults.loaded()
            owing = list(self.replicas)
            self._events.put(None)

            def acknowledged() -> bool:
                while owing and (owing[-1].holds is weights or not owing[-1].serving or owing[-1].leaving):
                    owing.pop()
                return not owing

            # One call may have to end before the load begins; each has its own deadline.
            wait_s = self.config.rollout.patience_s
            while not self._changed.wait_for(lambda: self._broken or self._orphaned or acknowledged(), TICK_S):
                weights.check()
                if time.monotonic() < started + wait_s:
                    continue
                names = ", ".join(replica.name for replica in owing)
                raise RolloutError(
                    f"{names} did not acknowledge weights version {weights.manifest.version} within {wait_s:.0f} s "
                    "(twice rollout.deadline_s)"
                )
            if error := self._broken or self._orphaned:
                raise error
            holding = sum(replica.holds is weights for replica in self.replicas)
        manifest, seconds = weights.manifest, time.monotonic() - started
        event("publish", version=manifest.version, checksum=manifest.checksum, replicas=holding, seconds=seconds)
        return seconds

    def submit(
        self,
        requests: list[RolloutRequest],
        kept: Mapping[int, tuple[ray.ObjectRef, RolloutStats]] | None = None,
        follow_up: FollowUp | None = None,
        first: bool = False,
    ) -> Batch:
        """Queues groups; returns at once. kept: groups that are there already, by their place; follow_up: see `Batch`,
        must not block; first: before all that is queued, since the caller waits for these now."""
        batch = Batch(requests, self._stalled, follow_up)
        for place, (ref, stats) in (kept or {}).items():
            batch.finish([place], [ref], stats)
        self._enqueue(batch, [place for place in range(len(requests)) if place not in (kept or {})], first)
        return batch

    def _stalled(self) -> Exception | None:
        """Why no group comes, if it is for want of room."""
        return None if self.serving else self._roomless()

    def redo(self, batch: Batch) -> None:
        """Queues again what of a batch has been lost with the node that held it."""
        lost = batch.forget_lost()
        log.warning("%d groups were lost with their node; they are generated again", len(lost))
        with self._changed:
            self.rerun_groups += len(lost)
        self._enqueue(batch, lost, first=True)

    def cancel(self) -> None:
        """Forgets all work: what is queued is not begun, what is being made is not used."""
        with self._changed:
            for batch in {work.batch for work in [*self._queue, *self._under_way()]}:
                batch.cancelled = True
            self._queue.clear()

    def close(self) -> None:
        """Ends every replica."""
        with self._changed:
            self._stopping = True
        self._events.put(None)
        self._thread.join(timeout=30)
        for replica in self.replicas:
            replica.end()

    def _enqueue(self, batch: Batch, places: list[int], first: bool) -> None:
        size = self.config.rollout.groups_per_call
        pieces = [places[i : i + size] for i in range(0, len(places), size)]
        work = [Work([batch.requests[place] for place in piece], batch, piece) for piece in pieces]
        with self._changed:
            if error := self._broken or self._orphaned:
                raise error
            if first:
                self._queue.extendleft(reversed(work))
            else:
                self._queue.extend(work)
        self._events.put(None)

    def _under_way(self) -> list[Work]:
        return [r.call.work for r in self.replicas if r.call and r.call.work]

    def _add(self) -> None:
        replica = self._replica_type(
            self.config, self._started, lambda replica, call: self._events.put((replica, call))
        )
        self._started += 1
        replica.build()
        self.replicas.append(replica)

    def _run(self) -> None:
        try:
            tick = 0.0
            while not self._stopping:
                try:
                    ended = self._events.get(timeout=TICK_S)
                except queue.Empty:
                    ended = None
                with self._changed:
                    if self._stopping:
                        return
                    if ended and ended[0].call is ended[1]:  # else the call was given up at its deadline
                        self._ended(*ended)
                        self._next(ended[0])
                    if ended is None or time.monotonic() > tick:
                        tick = time.monotonic() + TICK_S
                        self._look_round()
                    self._changed.notify_all()
        except Exception as error:  # this thread's end would go unheard; whoever waits must hear it
            log.exception("the rollout pool failed")
            self._break(RolloutError(f"the rollout pool failed: {type(error).__name__}: {error}"))

    def _look_round(self) -> None:
        """Everything that no event announces: numbers, deadlines, replicas without a call."""
        now = time.monotonic()
        for replica in list(self.replicas):
            if replica.call is None:
                if not replica.serving and now > replica.again_at:
                    replica.build()
                self._next(replica)
            elif now > replica.call.deadline:
                self._overdue(replica, replica.call)
            elif self.weights:
                replica.pause_for(self.weights)
        self._resize()

    def _next(self, replica: Replica) -> None:
        """What a replica without a call does."""
        if replica.call is not None:
            return
        if replica.leaving:
            self.replicas.remove(replica)
            replica.end()
            event("replica_left", replica=replica.name)
        elif replica.serving and self.weights and replica.holds is not self.weights:
            self._load(self.weights, replica)
        elif replica.serving and self._queue:
            replica.generate(self._queue.popleft())

    def _load(self, weights: Publication, replica: Replica) -> None:
        """Sends a version to one replica, or, if all must fetch it together, to all of them once the last is free."""
        fetching = [replica]
        if weights.together:
            # Each of many that wait asks for the one that was still busy, not for all.
            if self._awaited and self._awaited.call and self._awaited.lacks(weights):
                return
            fetching = [r for r in self.replicas if r.lacks(weights)]
            self._awaited = next((r for r in fetching if r.call), None)
            if self._awaited:
                return
        for fetcher, ticket in zip(fetching, weights.tickets(len(fetching)), strict=True):
            fetcher.load(weights, self._manifest, ticket)

    def _ended(self, replica: Replica, call: Call) -> None:
        replica.call = None
        error = call.future.exception()
        cause = error.cause if isinstance(error, RayTaskError) else error
        if error is None:
            replica.serving, replica.idle_since = True, time.monotonic()
        if call.kind == "build" and error is None:
            self._built(replica, call.future.result())
        elif call.work:
            self._generated(replica, call, call.work, error)
        elif isinstance(cause, ObjectLostError):
            replica.serving, replica.again_at = False, time.monotonic() + TICK_S
            self._missing(call.weights)
        elif isinstance(cause, TransportError):
            self._unsent(replica, call.weights, cause)
        elif isinstance(error, RayTaskError):
            self._wrong(replica, str(cause))
        elif error is not None:
            call.give_up()
            self._lost(replica, error)
        elif call.weights:
            held, sent = call.future.result(), call.weights.manifest.checksum
            if held == sent:
                replica.holds = call.weights
                self._faults.loaded()
            else:
                self._wrong(replica, f"it holds {held} instead of {sent}")

    def _built(self, replica: Replica, start: str) -> None:
        """start: which start of the actor answers. If it is one that has answered before, Ray told late of a death
        that is known: nothing was lost, and the work given out meanwhile was not tried."""
        if replica.answered not in (None, start):
            self.restarts += 1
            if replica.blamed:
                replica.blamed.deaths += 1
        replica.answered, replica.blamed = start, None
        event("replica_ready", replica=replica.name)

    def _generated(self, replica: Replica, call: Call, work: Work, error: BaseException | None) -> None:
        if error is None:
            self._faults.worked()
            stats = call.future.result()
            if stats is None:
                self._paused(work, call.refs[0])
                return
            span(replica.name, "reasoning", stats.started, stats.reasoning_s)
            span(replica.name, "drawing", stats.started + stats.reasoning_s, stats.drawing_s)
            work.batch.finish(work.places, call.refs, stats)
            return
        if isinstance(error, RayTaskError) and isinstance(error.cause, ForgottenWeightsError):
            # It died while idle. What is to be generated goes to whoever has the weights, which it gets again.
            self.restarts += 1
            replica.holds = None
            event("replica_lost", replica=replica.name, reason="it died while idle")
        elif isinstance(error, RayTaskError):
            work.errors += 1
            if not isinstance(error.cause, ObjectLostError):  # of what was begun, whose node is lost
                # An engine that died within a living process fails at everything, sooner than others finish.
                self._restart(replica, one_line(error.cause))
        else:
            replica.blamed = work
            self._lost(replica, error)
        self._retry(work, f"{replica.name}: {getattr(error, 'cause', None) or type(error).__name__}")

    def _paused(self, work: Work, begun: ray.ObjectRef) -> None:
        """Its replica loads the new weights; then it, or another, goes on with the chains as they are."""
        if not work.batch.cancelled:
            work.begun = begun
            self.continued_groups += len(work.requests)
            self._queue.appendleft(work)

    def _retry(self, work: Work, reason: str) -> None:
        if work.batch.cancelled:
            return
        if work.errors >= MAX_ERRORS or work.deaths >= MAX_DEATHS:
            work.batch.fail(RolloutError(f"rollout failed {work.errors + work.deaths} times, last: {reason}"))
            return
        log.warning("rollout work goes to another replica: %s", reason)
        event("rollout_retried", groups=len(work.requests), reason=reason)
        self.rerun_groups += len(work.requests)
        work.begun = None  # it may be what was lost
        self._queue.appendleft(work)

    def _lost(self, replica: Replica, error: BaseException) -> None:
        """Ray rebuilds the actor. One whose `__init__` failed Ray gives up; another replica takes its place."""
        if replica.serving:
            log.warning("%s is lost (%s); Ray restarts it", replica.name, type(error).__name__)
            event("replica_lost", replica=replica.name, reason=type(error).__name__)
        replica.serving, replica.holds, replica.again_at = False, None, time.monotonic() + TICK_S
        if isinstance(error, RayActorError) and error.actor_init_failed:
            problem = not_built(error)
            reason = f"{replica.name} cannot be built: {problem or last_line(error)}"
            self._fault(ConfigError(reason) if problem else RolloutError(reason))
            self.replicas.remove(replica)
            replica.end()

    def _wrong(self, replica: Replica, reason: str) -> None:
        """A replica that does not hold what it was sent is started afresh."""
        self._fault(RolloutError(f"{replica.name}: {reason}"))
        self._restart(replica, reason)

    def _fault(self, error: ConfigError | RolloutError) -> None:
        if too_many := self._faults.fault(error, self.replicas):
            self._break(too_many)

    def _missing(self, weights: Publication | None) -> None:
        if weights and weights is self.weights and (lost := self._faults.missing(weights, self.replicas)):
            self._orphaned = lost
            self._fail_all(lost)

    def _unsent(self, replica: Replica, weights: Publication | None, error: TransportError) -> None:
        """It is sent again, unless whoever sends it is lost: a rebuilt learner publishes again."""
        log.warning("%s: %s; it is sent again", replica.name, error)
        if weights is None or weights is not self.weights:
            return
        try:
            weights.check()
        except RuntimeError as lost:
            self._orphaned = LostWeightsError(f"weights version {weights.manifest.version} cannot be sent: {lost}")
            self._fail_all(self._orphaned)

    def _overdue(self, replica: Replica, call: Call) -> None:
        waited = time.monotonic() - call.started
        if call.kind == "build" and not replica.has_room():
            log.warning("%s waits for room for %s since %.0f s", replica.name, replica.room.each, waited)
            call.deadline = time.monotonic() + self.config.rollout.deadline_s
            return
        replica.call = None
        call.give_up()
        self._restart(replica, f"it did not finish {call.kind} within {waited:.0f} s")
        if call.work:
            replica.blamed = call.work
            self._retry(call.work, f"{replica.name} made no progress for {waited:.0f} s")

    def _restart(self, replica: Replica, reason: str) -> None:
        log.warning("%s: %s; restarting it", replica.name, reason)
        event("replica_lost", replica=replica.name, reason=reason)
        replica.serving, replica.holds, replica.again_at = False, None, time.monotonic() + TICK_S
        replica.restart()

    def _resize(self) -> None:
        """Asks for replicas while work is queued that nobody is there to take; lets long idle ones go."""
        staying = [replica for replica in self.replicas if not replica.leaving]
        number = wanted(staying, len(self._queue), (self.fewest, self.most), self.config.rollout.idle_s)
        if time.monotonic() >= self._faults.add_from:
            for _ in range(number - len(staying)):
                self._add()
        for replica in first_to_go(staying)[: max(0, len(staying) - number)]:
            replica.leaving = True
            if not replica.serving:
                replica.call = None
                self._next(replica)

    def _break(self, error: Exception) -> None:
        with self._changed:
            self._broken = error
            self._fail_all(error)
            self._changed.notify_all()

    def _fail_all(self, error: Exception) -> None:
        for batch in {work.batch for work in [*self._queue, *self._under_way()]}:
            batch.fail(error)
