"""Published weights: buckets and manifest, there and back, and what a checksum tells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_numbers import CHECKPOINT

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.types import WeightManifest
from common.weights import as_tensor, digest, held_bucket, nbytes, pack, plan, unpack

DTYPES = [torch.float32, torch.bfloat16]


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (3, 5), "a": (7,), "scalar": (), "c": (2, 1, 3), "none": (0, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def scratch(size: int = 4096) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: torch.dtype) -> None:
    weights = some_weights()
    bucket, flat = pack(weights.items(), dtype, scratch())
    assert bucket.names == tuple(weights), "in the order given"
    assert nbytes(bucket.shapes, dtype) == len(flat)
    received = flat.numpy().copy()
    received.flags.writeable = False  # Ray's object store hands out arrays that may not be written
    found = dict(unpack(bucket, as_tensor(received), dtype))
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor.to(dtype)), name
    assert held_bucket(bucket, {name: tensor.to(dtype) for name, tensor in weights.items()}) == bucket


def test_strided_tensors_are_packed_by_value() -> None:
    matrix = torch.arange(12.0).view(3, 4).T
    bucket, flat = pack([("m", matrix)], torch.float32, scratch())
    assert torch.equal(dict(unpack(bucket, flat, torch.float32))["m"], matrix)
    assert held_bucket(bucket, {"m": matrix}) == bucket


def test_a_bucket_of_another_length_is_refused() -> None:
    bucket, flat = pack(some_weights().items(), torch.float32, scratch())
    with pytest.raises(ValueError, match=f"a bucket of {len(flat)} bytes arrived with {len(flat) - 8}"):
        list(unpack(bucket, flat[:-8], torch.float32))


@pytest.mark.parametrize("size", [1, 7, 8, 1001, (1 << 20) + 12, (3 << 20) + 5])
def test_a_digest_tells_every_damage(size: int) -> None:
    """One flipped bit anywhere, two exchanged words, bytes missing or added."""
    data = torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    whole = digest(data)
    assert digest(data.clone()) == whole
    assert digest(torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]) == whole, "wherever in memory"
    found = {whole, digest(data[:-1]), digest(torch.cat([data, torch.zeros(1, dtype=torch.uint8)]))}
    places = sorted({0, size // 2, size - 1})
    for place in places:
        damaged = data.clone()
        damaged[place] ^= 1 << 7
        found.add(digest(damaged))
    assert len(found) == 3 + len(places)
    if size > 16:
        exchanged = data.clone()
        exchanged[:8], exchanged[-16 - size % 8 : -8 - size % 8] = data[-16 - size % 8 : -8 - size % 8], data[:8]
        assert digest(exchanged) not in found


def test_buckets_are_cut_at_their_limit() -> None:
    shapes = {"a": (4,), "b": (4,), "big": (100,), "c": (1,), "d": (1,)}
    assert plan(shapes, torch.float32, 32) == [["a", "b"], ["big"], ["c", "d"]]
    assert plan(shapes, torch.bfloat16, 32) == [["a", "b"], ["big"], ["c", "d"]]
    assert plan(shapes, torch.float32, 1) == [[name] for name in shapes]
    assert plan({}, torch.float32, 1) == []


def test_a_manifest_says_what_changed() -> None:
    old, new = some_weights(), some_weights()
    new["c"][0, 0, 1] += 1

    def manifest(weights: dict[str, torch.Tensor], version: int) -> WeightManifest:
        names = plan({name: tuple(t.shape) for name, t in weights.items()}, torch.float32, 40)
        buckets = (pack(((n, weights[n]) for n in part), torch.float32, scratch())[0] for part in names)
        return WeightManifest(version, "float32", tuple(buckets))

    before, after = manifest(old, 3), manifest(new, 4)
    everything = list(range(len(before.buckets)))
    assert len(everything) > 1
    assert after.changed_since(None) == everything
    assert after.changed_since(replace(before, dtype="bfloat16")) == everything
    assert after.changed_since(before) == [next(i for i in everything if "c" in before.buckets[i].names)]
    assert after.differences(before) == ["c"]
    assert before.checksum == replace(before, version=9).checksum != after.checksum
    assert replace(before, dtype="bfloat16").checksum != before.checksum


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_policy_goes_from_learner_to_replica(golden_checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """The replica holds the compute type; what it then has must be what was published, frozen tensors included."""
    named = [(name, p + 1e-3) for name, p in golden_checkpoint.policy.named_parameters()]
    bucket, flat = pack(named, dtype, scratch(8 * sum(p.numel() for _, p in named)))
    replica = store.load(CHECKPOINT, dtype).policy.state_dict()
    assert held_bucket(bucket, replica) != bucket
    for name, tensor in unpack(bucket, flat, dtype):
        replica[name].copy_(tensor)
    assert held_bucket(bucket, replica) == bucket
    assert torch.equal(replica[named[0][0]], named[0][1].to(dtype))
