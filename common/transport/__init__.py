"""How a weight version gets from the learner to the replicas: one interface, one file for each way.

The learner group makes a `Publication`; the pool gives each replica a ticket of it, with which the replica's `Receiver`
gets the buckets that it lacks. None of the three knows the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from common.config import TrainConfig
from common.types import WeightManifest


class TransportError(RuntimeError):
    """Weights did not arrive whole because another process failed; the transfer can be tried again."""


class LostWeightsError(RuntimeError):
    """A published version is on no node any more, and no replica holds it: the learner has to publish again."""


class Publication(Protocol):
    """One version, ready to be fetched. together: whether all replicas that lack it must fetch it at the same time."""

    @property
    def manifest(self) -> WeightManifest: ...

    @property
    def together(self) -> bool: ...

    def tickets(self, replicas: int) -> list[Any]:
        """What so many replicas fetch this version with, one each, starting now; does not block."""

    def give_up(self, ticket: Any) -> None:
        """A replica that was given this ticket will not come: whoever waits for it stops waiting."""

    def check(self) -> None:
        """Raises if whoever sends this version is lost."""


class Receiver(Protocol):
    """A replica's end."""

    def receive(self, manifest: WeightManifest, held: WeightManifest, ticket: Any) -> Iterator[tuple[int, Tensor]]:
        """Index and bytes [n] of at least the buckets that differ from what is held, valid until the next.
        TransportError."""


def receiver(config: TrainConfig, device: torch.device) -> Receiver:
    """The receiving end of the configured transport."""
    if config.rollout.transport == "collective":
        from common.transport.collective import CollectiveReceiver

        return CollectiveReceiver(device, config.rollout.deadline_s)
    from common.transport.object_store import ObjectStoreReceiver

    return ObjectStoreReceiver()
