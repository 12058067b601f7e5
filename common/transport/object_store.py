"""Weights through Ray's object store: works on any machine, and no replica waits for another.

The bytes of a version stay in the object store of the learner's node until the next is published, so a replica that
joins or was restarted fetches them whenever it is up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import ray
from torch import Tensor

from common.types import WeightManifest
from common.weights import as_tensor


@dataclass(frozen=True, eq=False)
class ObjectStorePublication:
    """buffers: a reference to the bytes of every bucket."""

    manifest: WeightManifest
    buffers: list[ray.ObjectRef]
    together: ClassVar[bool] = False

    @cached_property
    def _ticket(self) -> ray.ObjectRef:
        return ray.put(self.buffers)

    def tickets(self, replicas: int) -> list[ray.ObjectRef]:
        """References to the list of references, which goes to each node once."""
        return [self._ticket] * replicas

    def give_up(self, ticket: ray.ObjectRef) -> None:
        pass

    def check(self) -> None:
        pass


class ObjectStoreReceiver:
    """Maps one bucket after the other."""

    def receive(
        self, manifest: WeightManifest, held: WeightManifest, ticket: list[ray.ObjectRef]
    ) -> Iterator[tuple[int, Tensor]]:
        for index in manifest.changed_since(held):
            yield index, as_tensor(ray.get(ticket[index]))
