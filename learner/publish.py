"""What a learner rank publishes: its weights bucket by bucket, and which buckets differ from the version before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.types import WeightBucket, WeightManifest
from common.weights import grown, nbytes, pack, plan
from learner.engine import Engine


class Publisher:
    """Every rank iterates in step, since gathering a bucket's shards is a collective; rank 0 gets the bytes.

    Frozen tensors have buckets of their own, which are read once; so with adapters on a frozen base, only the adapters
    are gathered, hashed and sent after the first version.
    """

    def __init__(self, engine: Engine, dtype: str, bucket_mb: int, rank: int) -> None:
        self.engine, self.dtype, self.rank = engine, getattr(torch, dtype), rank
        self.manifest: WeightManifest | None = None
        self._weights = dict(engine.module.named_parameters())
        shapes = {name: engine.shape(weight) for name, weight in self._weights.items()}
        trained = {name: shape for name, shape in shapes.items() if self._weights[name].requires_grad}
        frozen = {name: shape for name, shape in shapes.items() if name not in trained}
        learned = plan(trained, self.dtype, bucket_mb << 20)
        self._trained, self._plan = len(learned), learned + plan(frozen, self.dtype, bucket_mb << 20)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=next(iter(self._weights.values())).device)

    def changes(self, version: int) -> Iterator[Tensor]:
        """Rank 0: the bytes [n] of each bucket that differs from the version published before, in order; `manifest`
        then describes this version. The next iteration reuses the memory."""
        before = self.manifest
        buckets = []
        for index, names in enumerate(self._plan[: self._trained] if before else self._plan):
            bucket, flat = self._pack(names)
            buckets.append(bucket)
            if self.rank == 0 and (before is None or bucket != before.buckets[index]):
                yield flat
        unread = before.buckets[self._trained :] if before else ()
        name = str(self.dtype).removeprefix("torch.")
        self.manifest = WeightManifest(version, name, (*buckets, *unread))

    def bytes_of(self, indexes: list[int]) -> Iterator[Tensor]:
        """Rank 0: the bytes [n] of these buckets, packed again; other ranks yield nothing for each."""
        for index in indexes:
            _, flat = self._pack(self._plan[index])
            yield flat

    def _pack(self, names: list[str]) -> tuple[WeightBucket, Tensor]:
        weights = [self._weights[name] for name in names]
        with self.engine.gathered(weights):
            if self.rank:
                return WeightBucket((), (), ()), self._scratch
            self._scratch = grown(self._scratch, nbytes(map(self.engine.shape, weights), self.dtype))
            return pack(zip(names, weights, strict=True), self.dtype, self._scratch)
