"""The supervised actors of one scorer.

Each replica has a thread on the driver that hands its actor one group at a time. So an idle replica takes the next
group, a deadline measures scoring and not queueing, and a stuck actor holds up its own group only. The threads see
object references and scores, never images.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, ObjectLostError, RayActorError, RayError

from common.actors import Placement, last_line, not_built, options
from common.config import ConfigError, Reward
from common.events import event
from common.timeline import timed
from common.types import Group, Rewards
from rewards.actor import RewardActor

START_TIMEOUT_S = 600.0  # for an actor to be scheduled and built, at first and after a death
_PING_S = 30.0
_POLL_S = 0.2
_MOST_PAUSE_S = 30.0  # until another actor is tried in the place of one that cannot be built

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a group: its rewards, None if every try failed, when (time.monotonic), and why the last try
    failed."""

    rewards: Rewards | None
    finished: float
    problem: str = ""


@dataclass(eq=False)
class _Job:
    group: ray.ObjectRef[Group]
    future: Future[Outcome] = field(default_factory=Future)
    failed_on: list[int] = field(default_factory=list)


class Replicas:
    """Starts a scorer's actors. A failed group goes to another replica first; a dead or stuck actor is restarted, on
    another node if its own is gone."""

    def __init__(self, scorer: Reward, run_name: str = "") -> None:
        self.scorer = scorer
        self._run = f"{run_name}-" if run_name else ""
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._closing = threading.Event()  # apart: who waits for an actor must not take the notice of a new job
        self._broken: Exception | None = None
        self._restarts = 0
        self._rooms = [Placement(scorer.asked, name=self._actor_name(index)) for index in range(scorer.replicas)]
        self._actors = [self._start(index) for index in range(scorer.replicas)]
        self._replicas = set(range(scorer.replicas))  # not given up
        self._live = set(self._replicas)  # up and serving
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=self._actor_name(i), daemon=True) for i in self._live
        ]

    def _actor_name(self, index: int) -> str:
        return f"{self._run}reward-{self.scorer.name}-{index}"

    def _start(self, index: int) -> Any:
        actor = ray.remote(RewardActor).options(
            name=self._actor_name(index),
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=self._rooms[index].slot(),
            **options(self.scorer),
        )
        return actor.remote(self.scorer.name, self.scorer.options)

    def wait(self) -> None:
        """Blocks until every actor is up, then serves. ConfigError if the scorer cannot be built or the cluster has no
        room for its actors; RuntimeError if they are not built in time."""
        name = self.scorer.name
        try:
            self._starts: list[str] = ray.get([actor.ping.remote() for actor in self._actors], timeout=START_TIMEOUT_S)
        except GetTimeoutError as error:
            problem = f"reward {name}: its actors were not built within {START_TIMEOUT_S:.0f} s"
            raise self._roomless(self._replicas) or RuntimeError(problem) from error
        except RayActorError as error:
            raise ConfigError(f"reward {name} cannot be built: {not_built(error) or last_line(error)}") from error
        for thread in self._threads:
            thread.start()

    def _roomless(self, indexes: Iterable[int]) -> ConfigError | None:
        """What to say if any of these actors waits for room."""
        waiting = [index for index in sorted(indexes) if not self._rooms[index].granted()]
        names = ", ".join(map(self._actor_name, waiting))
        return self._rooms[waiting[0]].missing(names, f"{START_TIMEOUT_S:.0f} s") if waiting else None

    def submit(self, group: ray.ObjectRef[Group]) -> Future[Outcome]:
        """Queues a group. The future fails with ObjectLostError if the group was lost with its node, and with
        RuntimeError when no replica is left, ConfigError if for want of room."""
        job = _Job(group)
        with self._changed:
            if self._broken is not None:
                raise self._broken
            self._jobs.append(job)
            self._changed.notify()  # any idle replica may take a job that never failed
        return job.future

    @property
    def patience_s(self) -> float:
        """How long a group that is being scored may take: its tries, and a restart after each."""
        return (self.scorer.retries + 1) * (self.scorer.deadline_s + START_TIMEOUT_S)

    def state(self) -> tuple[int, int, int]:
        """Groups that wait, actors that serve, actors that were lost since the start."""
        with self._changed:
            return len(self._jobs), len(self._live), self._restarts

    def close(self) -> None:
        """Ends the actors; groups not scored yet are cancelled."""
        with self._changed:
            self._closed = True
            self._closing.set()
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify_all()
        for actor, room in zip(self._actors, self._rooms, strict=True):
            ray.kill(actor)
            room.give_back()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_PING_S)

    def _serve(self, index: int) -> None:
        while (job := self._take(index)) is not None:
            try:
                if self._score(index, job):
                    self._rejoin(index)
            except Exception as error:  # this thread's end would go unheard; whoever waits for the score must hear it
                log.exception("%s failed", self._actor_name(index))
                if not job.future.done():
                    job.future.set_exception(error)
                self._give_up(index, f"{type(error).__name__}: {error}")

    def _score(self, index: int, job: _Job) -> bool:
        """One try. Returns whether the actor was lost over it."""
        give_up = time.monotonic() + START_TIMEOUT_S
        while not ray.wait([job.group], timeout=_POLL_S, fetch_local=False)[0]:
            if self._closed:
                job.future.cancel()
                return False
            if time.monotonic() > give_up:
                waited = f"a group to be scored was not there for {START_TIMEOUT_S:.0f} s"
                job.future.set_exception(RuntimeError(waited))
                return False
        actor = self._actors[index]
        try:
            with timed(self._actor_name(index).removeprefix(self._run), "score"):
                rewards: Rewards = ray.get(actor.score.remote(job.group), timeout=self.scorer.deadline_s)
        except ObjectLostError as error:  # its node is gone; whoever asked for it has it made again
            job.future.set_exception(error)
            return False
        except RayError as error:  # recovered from: tried again, in the end masked
            if isinstance(error, GetTimeoutError) and not self._closed:
                ray.kill(actor, no_restart=False)
            elif isinstance(error, RayActorError) and self._still_up(index):
                # Late news of an earlier death: this group has not been tried.
                self._put_back(job)
                return False
            return self._fail(index, job, error)
        job.future.set_result(Outcome(rewards, time.monotonic()))
        return False

    def _still_up(self, index: int) -> bool:
        """Whether the actor is the one that the last ping found."""
        try:
            start: str = ray.get(self._actors[index].ping.remote(), timeout=_PING_S)
        except RayError:  # recovered from: it is not
            return False
        return start == self._starts[index]

    def _put_back(self, job: _Job) -> None:
        with self._changed:
            self._jobs.appendleft(job)
            self._changed.notify_all()

    def _take(self, index: int) -> _Job | None:
        """Waits for the first group that has not failed here, or has failed on every live replica. None: stop."""
        with self._changed:
            while not self._closed and index in self._replicas:
                for job in self._jobs:
                    if index not in job.failed_on or self._live <= set(job.failed_on):
                        self._jobs.remove(job)
                        return job
                self._changed.wait()
            return None

    def _fail(self, index: int, job: _Job, error: RayError) -> bool:
        lost = isinstance(error, GetTimeoutError | RayActorError)
        with self._changed:
            if self._closed:
                job.future.cancel()
                return False
            if lost:
                self._live.discard(index)
                self._restarts += 1
            job.failed_on.append(index)
            final = len(job.failed_on) > self.scorer.retries
            if not final:
                self._jobs.appendleft(job)
            self._changed.notify_all()
        why = (
            f"no score within {self.scorer.deadline_s:g} s" if isinstance(error, GetTimeoutError) else last_line(error)
        )
        if lost:
            event("reward_lost", actor=self._actor_name(index), reason=why)
        if final:
            log.warning("%s: a group is masked after %d tries: %s", self._actor_name(index), len(job.failed_on), why)
            event("reward_masked", reward=self.scorer.name, tries=len(job.failed_on), reason=why)
            job.future.set_result(Outcome(None, time.monotonic(), why))
        return lost

    def _rejoin(self, index: int) -> None:
        """Waits for Ray to restart the actor, which serves again; a replica that does not come back is given up. One
        whose `__init__` failed Ray does not restart; another takes its place, since the reason may be a moment's."""
        give_up, pause = time.monotonic() + START_TIMEOUT_S, _POLL_S
        problem = ""
        while time.monotonic() < give_up:
            try:
                self._starts[index] = ray.get(self._actors[index].ping.remote(), timeout=_PING_S)
            except RayError as error:  # recovered from: Ray is still restarting it
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    problem, pause = last_line(error), min(2 * pause, _MOST_PAUSE_S)
                    log.warning("%s cannot be built: %s; trying again", self._actor_name(index), problem)
                    self._replace(index)
            else:
                with self._changed:
                    self._live.add(index)
                    self._changed.notify_all()
                event("reward_ready", actor=self._actor_name(index))
                return
            if self._closing.wait(pause):
                return
        self._give_up(index, self._roomless([index]) or problem or f"not restarted within {START_TIMEOUT_S:.0f} s")

    def _replace(self, index: int) -> None:
        with self._changed:  # `close` ends either the old one or the new one
            if not self._closed:
                ray.kill(self._actors[index])
                with suppress(ActorAlreadyExistsError):  # for a moment the old one still has the name: next time
                    self._actors[index] = self._start(index)

    def _give_up(self, index: int, problem: ConfigError | str) -> None:
        log.error("%s is given up: %s", self._actor_name(index), problem)
        with self._changed:
            self._replicas.discard(index)
            self._live.discard(index)
            self._changed.notify_all()
            if self._replicas:
                return
            lost = RuntimeError(f"reward {self.scorer.name} has no actor left; the last one: {problem}")
            self._broken = problem if isinstance(problem, ConfigError) else lost
            for job in self._jobs:
                job.future.set_exception(self._broken)
            self._jobs.clear()
