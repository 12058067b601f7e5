"""One rollout replica as the driver sees it: an actor in a placement group of its own, with one call at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from common.actors import Placement, options
from common.config import TrainConfig
from common.transport import Publication
from rollout.actor import RolloutReplica
from rollout.batch import Work
from rollout.reasoner_actor import PAUSE, pausable

STATES = ("starting", "idle", "generating", "loading", "leaving")


@dataclass(eq=False)
class Call:
    """A call under way. future: what it returns; refs: the groups it makes; weights: the version it loads; pausing: the
    version that its reasoning was told to pause for."""

    kind: Literal["build", "load", "generate"]
    future: Future[Any]
    deadline: float
    started: float = field(default_factory=time.monotonic)
    work: Work | None = None
    refs: list[ray.ObjectRef] = field(default_factory=list)
    weights: Publication | None = None
    ticket: Any = None
    pausing: Publication | None = None

    def give_up(self) -> None:
        """Whoever sends what it loads stops waiting for this replica."""
        if self.weights:
            self.weights.give_up(self.ticket)


class Replica:
    """Ray restarts the actor after a death, on another node if it must, since it also moves the placement group."""

    def __init__(self, config: TrainConfig, index: int, arrived: Callable[[Replica, Call], None]) -> None:
        """arrived is called, from a thread of Ray's, when a call ends."""
        self.name = f"rollout-{index}"
        self.deadline_s = config.rollout.deadline_s
        self.pauses = bool(config.max_staleness)
        self._arrived = arrived
        self.handle = self.start(config)
        self.call: Call | None = None
        self.holds: Publication | None = None
        self.answered: str | None = None  # which start of the actor last answered
        self.blamed: Work | None = None  # what it had been given when it was lost
        self.serving = False  # built, and answered its last call
        self.leaving = False
        self.idle_since = 0.0
        self.again_at = 0.0  # while Ray rebuilds the actor, calls to it fail at once

    def start(self, config: TrainConfig) -> Any:
        """The actor, in its room."""
        name, (own, *beside) = f"{config.run_name}-{self.name}", config.rollout.actors.values()
        self.room = Placement(own.asked, name=name, beside=[resources.asked for resources in beside])
        actor = pausable(RolloutReplica, self.pauses).options(
            name=name, max_restarts=-1, scheduling_strategy=self.room.slot(), **options(own)
        )
        return actor.remote(config)

    def build(self) -> None:
        """Waits, in the background, until the actor is built."""
        self._begin("build", self.handle.ping.remote())

    def load(self, weights: Publication, manifest: ray.ObjectRef | None, ticket: Any) -> None:
        """Sends a version. manifest: a reference to its manifest, so that its many names go to each node once."""
        ref = self.handle.load_weights.remote(manifest, ticket)
        self._begin("load", ref, weights=weights, ticket=ticket)

    def generate(self, work: Work) -> None:
        """Gives out work."""
        call = self.handle.generate.options(num_returns=1 + len(work.requests))
        holding = self.holds.manifest.version if self.holds else -1
        stats, *refs = call.remote(work.requests, work.begun, holding)
        self._begin("generate", stats, work=work, refs=refs)

    def pause_for(self, weights: Publication) -> None:
        """Has a generation under way stop its reasoning for weights that it lacks; one that draws already goes on."""
        if self.pauses and self.call and self.call.work and weights not in (self.holds, self.call.pausing):
            self.call.pausing = weights
            self.handle.pause.options(concurrency_group=PAUSE).remote(weights.manifest.version)

    def _begin(self, kind: Literal["build", "load", "generate"], ref: ray.ObjectRef, **about: Any) -> None:
        call = Call(kind, ref.future(), time.monotonic() + self.deadline_s, **about)
        self.call = call
        call.future.add_done_callback(lambda _: self._arrived(self, call))

    @property
    def state(self) -> str:
        """What it does, one of STATES."""
        if self.leaving:
            return "leaving"
        if not self.serving:
            return "starting"
        return {"load": "loading", "generate": "generating"}.get(self.call.kind if self.call else "", "idle")

    def lacks(self, weights: Publication) -> bool:
        """Whether it serves on without these weights."""
        return self.serving and not self.leaving and self.holds is not weights

    def has_room(self) -> bool:
        """Whether the cluster has granted the placement group."""
        return self.room.granted()

    def restart(self) -> None:
        """Ends the process, hung or not; Ray starts another."""
        ray.kill(self.handle, no_restart=False)

    def end(self) -> None:
        """Ends the actor for good and gives its room back."""
        ray.kill(self.handle)
        self.room.give_back()
