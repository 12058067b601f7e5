"""vLLM in an actor of its own, beside the replica that it reasons for: with CPUs and GPUs of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.actors import options
from common.config import Rollout
from common.types import WeightBucket
from common.weights import as_tensor, grown, held_bucket, nbytes, pack, plan, unpack
from rollout.reasoner import Completion, start_reasoner
from rollout.reasoner_dir import checked_weights

log = logging.getLogger(__name__)
PAUSE = "pause"
POLL_S = 0.05


def pausable(actor: type, pauses: bool) -> Any:
    """An actor class of Ray's whose `pause` is heard beside the call that it ends. Ray then makes all calls on a thread
    of their own; one that never pauses keeps to the main thread, where it was built."""
    groups: dict[str, Any] = {"concurrency_groups": {PAUSE: 1} if pauses else {}}
    return ray.remote(**groups)(actor)


class ReasonerActor:
    """The actor: a `Reasoner` whose weights arrive in buckets."""

    def __init__(self, described: dict[str, Any] | Path, settings: dict[str, Any]) -> None:
        self.reasoner = start_reasoner(described, **settings)
        self.pausing = threading.Event()
        self.dtype = getattr(torch, settings["dtype"])

    def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    def generate(self, prompts: list[list[int]], seeds: list[int], pauses: bool, **how: Any) -> list[Completion]:
        """See `Reasoner.generate`, with `pause` for its `paused`."""
        self.pausing.clear()
        return self.reasoner.generate(prompts, seeds, paused=self.pausing.is_set if pauses else None, **how)

    def pause(self) -> None:
        """Ends the reasoning under way; called beside it, until it has ended."""
        self.pausing.set()

    def probe(self, ids: list[int]) -> list[float]:
        """See `Reasoner.probe`."""
        return self.reasoner.probe(ids)

    def begin_load(self) -> None:
        """See `Reasoner.begin_load`."""
        self.reasoner.begin_load()

    def load_part(self, bucket: WeightBucket, flat: NDArray[np.uint8]) -> None:
        """The bytes [n] of a bucket, which vLLM compares with what it then holds. RuntimeError if they arrived damaged
        or were not taken."""
        weights = dict(unpack(bucket, as_tensor(flat), self.dtype))
        if held_bucket(bucket, weights) != bucket:
            raise RuntimeError(f"the weights from {bucket.names[0]} on did not arrive as they were sent")
        self.reasoner.load_part(weights.items())

    def end_load(self) -> None:
        """See `Reasoner.end_load`."""
        self.reasoner.end_load()


class RemoteReasoner:
    """The replica's end: what `Reasoner` does, done by an actor in the second bundle of the replica's placement group.

    The two live and die together. Ray ends the actor when the replica, which owns it, is lost; a replica that loses
    its reasoner ends itself, and Ray restarts it with another.
    """

    def __init__(
        self, rollout: Rollout, described: dict[str, Any] | Path, settings: dict[str, Any], pauses: bool
    ) -> None:
        """Blocks until the engine is up. pauses: whether calls may be paused. RayActorError if it cannot be built."""
        self._shapes, self._dtype = settings["shapes"], getattr(torch, settings["dtype"])
        self._buckets = plan(self._shapes, self._dtype, rollout.bucket_mb << 20)
        room = ray.util.get_current_placement_group()
        assert room is not None, "a replica lives in a placement group"
        own = pausable(ReasonerActor, pauses).options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(room, 1), **options(rollout.actors["reasoner"])
        )
        self.handle: Any = own.remote(described, settings)
        self._call("pid")

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        *,
        paused: Callable[[], bool] | None = None,
        **how: Any,
    ) -> list[Completion]:
        """See `Reasoner.generate`."""
        call = self.handle.generate.remote(prompts, seeds, paused is not None, **how)
        while paused and not ray.wait([call], timeout=POLL_S)[0]:
            if paused():
                self.handle.pause.options(concurrency_group=PAUSE).remote()
        return self._result(call)

    def probe(self, ids: list[int]) -> list[float]:
        """See `Reasoner.probe`."""
        return self._call("probe", ids)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `Reasoner.load_weights`; through the object store, bucket by bucket."""
        given = dict(checked_weights(weights, self._shapes))
        self._call("begin_load")
        scratch = torch.empty(0, dtype=torch.uint8)
        for names in self._buckets:
            scratch = grown(scratch, nbytes((self._shapes[name] for name in names), self._dtype))
            bucket, flat = pack(((name, given[name]) for name in names), self._dtype, scratch)
            self._call("load_part", bucket, flat.numpy())
        self._call("end_load")

    def _call(self, method: str, *args: Any) -> Any:
        return self._result(getattr(self.handle, method).remote(*args))

    def _result(self, call: ray.ObjectRef) -> Any:
        try:
            return ray.get(call)
        except RayActorError as error:
            if error.actor_init_failed:
                raise
            log.error("the reasoner is lost (%s), and this replica with it", type(error).__name__)
            os._exit(1)
