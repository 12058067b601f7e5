"""The groups of one training step or evaluation, while replicas make them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from common.config import ConfigError
from common.transport import LostWeightsError
from common.types import RolloutRequest, RolloutStats

LOST_AFTER_S = 300.0
FollowUp = Callable[[ray.ObjectRef, int], Any]


class RolloutError(RuntimeError):
    """Rollout work that could not be done."""


@dataclass(eq=False)
class Work:
    """Requests that one replica generates together. errors: tries that raised; deaths: replicas lost over it; begun:
    what there is of it, since it was paused for new weights."""

    requests: list[RolloutRequest]
    batch: Batch
    places: list[int]
    errors: int = 0
    deaths: int = 0
    begun: ray.ObjectRef | None = None


@dataclass(eq=False)
class Batch:
    """Filled as replicas finish. groups: a reference per request, None while it is being made; versions: the weight
    version of each; arrived: positions of groups that `arrivals` has not yielded yet; stalled: says why none comes, if
    its maker knows; follow_up: begins what is next for a finished group of so many chains, while others are made and
    nobody has asked for it yet; begun: what that returned, by position."""

    requests: list[RolloutRequest]
    stalled: Callable[[], Exception | None] = lambda: None
    follow_up: FollowUp | None = None
    groups: list[ray.ObjectRef | None] = field(init=False)
    versions: list[int] = field(init=False)
    stats: list[RolloutStats] = field(default_factory=list)
    arrived: deque[int] = field(default_factory=deque)
    begun: dict[int, Any] = field(default_factory=dict)
    error: Exception | None = None
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic)
    finished: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.groups = [None] * len(self.requests)
        self.versions = [-1] * len(self.requests)

    def size(self, place: int) -> int:
        """Chains of a group."""
        return len(self.requests[place].seeds)

    @property
    def refs(self) -> list[ray.ObjectRef]:
        """The groups in the order of the requests, once all have arrived."""
        return [ref for ref in self.groups if ref is not None]

    @property
    def images_per_s(self) -> float:
        """Of the chains that were made here; those that a checkpoint kept have no time."""
        made = [stats.chains for stats in self.stats if stats.started]
        return sum(made) / (self.finished - self.started) if made else 0.0

    def finish(self, places: list[int], refs: list[ray.ObjectRef], stats: RolloutStats) -> None:
        """A replica has made the groups of these positions."""
        with self.changed:
            for place, ref in zip(places, refs, strict=True):
                self.groups[place], self.versions[place] = ref, stats.version
                if self.follow_up and not self.cancelled:
                    # Whoever asks for the group begins it again then, and hears of the error.
                    with suppress(RuntimeError, ConfigError):
                        self.begun[place] = self.follow_up(ref, self.size(place))
            self.arrived.extend(places)
            self.stats.append(stats)
            self.finished = time.monotonic()
            self.changed.notify_all()

    def adopt(self, places: list[int], other: Batch) -> None:
        """Puts the finished groups of another batch, in its order, in the place of some of these."""
        with self.changed:
            for number, place in enumerate(places):
                self.requests[place] = other.requests[number]
                self.groups[place], self.versions[place] = other.groups[number], other.versions[number]
            self.stats.extend(other.stats)
            self.finished = max(self.finished, other.finished)

    def fail(self, error: Exception) -> None:
        """Whoever waits for a group hears of the error."""
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def arrivals(self, deadline_s: float) -> Iterator[tuple[int, Any]]:
        """Yields (position, group reference) as groups become ready; RolloutError if the work failed or stalls; what
        `stalled` says, where it knows better; LostWeightsError if no replica can get the weights."""
        for _ in self.groups:
            with self.changed:
                while not self.arrived:
                    if isinstance(self.error, ConfigError | LostWeightsError):
                        raise self.error
                    if self.error:
                        raise RolloutError(str(self.error)) from self.error
                    if not self.changed.wait(deadline_s):
                        if reason := self.stalled():
                            raise reason
                        missing = sum(ref is None for ref in self.groups)
                        raise RolloutError(
                            f"no replica finished a group for {deadline_s:.0f} s (twice rollout.deadline_s); "
                            f"{missing} of {len(self.groups)} groups are missing"
                        )
                place = self.arrived.popleft()
            yield place, self.groups[place]

    def forget_lost(self) -> list[int]:
        """Clears the groups whose bytes are on no node any more, or cannot be had for minutes, and returns their
        positions. `arrivals` begins anew, so that all are scored again."""
        probes = {place: touch.remote(ref) for place, ref in enumerate(self.groups) if ref is not None}
        lost, deadline = [], time.monotonic() + LOST_AFTER_S
        for place, probe in probes.items():
            try:
                ray.get(probe, timeout=max(0.0, deadline - time.monotonic()))
            except RayError:  # also if the probe was lost: a group too many costs time, one too few the run
                lost.append(place)
        with self.changed:
            for place in lost:
                self.groups[place] = None
            self.arrived = deque(i for i, ref in enumerate(self.groups) if ref is not None)
        return lost


@ray.remote(num_cpus=0, max_retries=0)
def touch(group: object) -> None:
    """Runs where the group is or can be brought; fails where it cannot."""
