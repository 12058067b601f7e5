"""Published weights: bytes and manifest, there and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_numbers import CHECKPOINT

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.weights import checksum, checksum_of, pack, unpack


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (3, 5), "a": (7,), "scalar": (), "c": (2, 1, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(dtype: torch.dtype) -> None:
    weights = some_weights()
    manifest, buffer = pack(weights.items(), 3, dtype)
    assert (manifest.version, manifest.dtype) == (3, str(dtype).removeprefix("torch."))
    assert manifest.names == tuple(weights), "in the order given"
    assert manifest.nbytes == buffer.nbytes == dtype.itemsize * sum(w.numel() for w in weights.values())
    found = unpack(manifest, buffer)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor.to(dtype)), name
    assert checksum_of(weights, manifest) == manifest.checksum


def test_read_only_memory() -> None:
    """Ray's object store hands out arrays that may not be written."""
    manifest, buffer = pack(some_weights().items(), 0, torch.float32)
    buffer.flags.writeable = False
    assert torch.equal(unpack(manifest, buffer)["b"], some_weights()["b"])


def test_strided_tensors_are_packed_by_value() -> None:
    matrix = torch.arange(12.0).view(3, 4).T
    manifest, buffer = pack([("m", matrix)], 0, torch.float32)
    assert torch.equal(unpack(manifest, buffer)["m"], matrix)


@pytest.mark.parametrize("damage", ["flip", "shorten"])
def test_damaged_bytes_are_refused(damage: str) -> None:
    manifest, buffer = pack(some_weights().items(), 12, torch.float32)
    buffer = buffer.copy()
    if damage == "flip":
        buffer[len(buffer) // 2] ^= 1
    else:
        buffer = buffer[:-4]
    with pytest.raises(ValueError, match=f"weights version 12 arrived with checksum .*, not {manifest.checksum}"):
        unpack(manifest, buffer)


def test_bytes_of_another_version_are_refused() -> None:
    manifest, _ = pack(some_weights(0).items(), 1, torch.float32)
    _, buffer = pack(some_weights(1).items(), 2, torch.float32)
    with pytest.raises(ValueError, match="weights version 1 "):
        unpack(manifest, buffer)


def test_checksum_of_held_weights_tells_one_changed_value() -> None:
    weights = some_weights()
    manifest, _ = pack(weights.items(), 0, torch.bfloat16)
    weights["b"][1, 2] += 1
    assert checksum_of(weights, manifest) != manifest.checksum
    assert checksum(np.zeros(3, np.uint8)) != checksum(np.zeros(4, np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_goes_from_learner_to_replica(golden_checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """The replica holds the compute type; what it then has must answer with the published checksum."""
    groups = golden_checkpoint.policy.parameter_groups()
    named = [(name, p + 1e-3) for pairs in groups.values() for name, p in pairs]
    manifest, buffer = pack(named, 7, dtype)
    replica = store.load(CHECKPOINT, dtype).policy
    assert checksum_of(replica.state_dict(), manifest) != manifest.checksum
    missing = replica.load_state_dict(unpack(manifest, buffer), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["latent_pos_embed.pos_embed"], "everything but what is frozen travels"
    assert checksum_of(replica.state_dict(), manifest) == manifest.checksum
    name, wanted = named[0]
    assert torch.equal(replica.state_dict()[name], wanted.to(dtype))
    with pytest.raises(ValueError, match="version 8"):
        unpack(replace(manifest, version=8, checksum="0"), buffer)
