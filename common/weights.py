"""Published weights: buckets of tensors, what they weigh, and a checksum computed where the tensors live."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.types import WeightBucket

WORD = 8  # bytes; every tensor of a bucket starts at a multiple
_BLOCK = 1 << 17  # words hashed at a time: the products stay in a core's cache
_PRIME = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def digest(tensor: Tensor) -> int:
    """64-bit checksum of a tensor's bytes, on whatever device they are, near the speed of reading them.

    Words of 8 bytes times fixed odd numbers, added up modulo 2^64, block by block: any changed word and any exchange of
    words shows. It finds accidents; it does not withstand an adversary.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % WORD:
        raw = raw.clone()
    whole = raw.numel() // WORD * WORD
    words, factors = raw[:whole].view(torch.int64), _factors(raw.device)
    products = torch.empty(min(_BLOCK, len(words)), dtype=torch.int64, device=raw.device)
    sums = []
    for block in words.split(_BLOCK):
        product = products[: len(block)]
        torch.mul(block, factors[: len(block)], out=product)
        sums.append(product.sum())
    value = raw.numel()
    for part in torch.stack(sums).tolist() if sums else []:
        value = (value * _PRIME + part) & _MASK
    for byte in raw[whole:].tolist():
        value = (value * _PRIME + byte + 1) & _MASK
    return value


@cache
def _factors(device: torch.device) -> Tensor:
    """The odd numbers that words are multiplied with."""
    state = np.random.SeedSequence(0).generate_state(_BLOCK, np.uint64) | np.uint64(1)
    return torch.from_numpy(state.view(np.int64)).to(device)


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Names in order, cut into buckets of at most `limit` bytes; a tensor that is larger has a bucket of its own."""
    return cut({name: _size(shape, dtype) for name, shape in shapes.items()}, limit)


def cut(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in runs whose sizes add up to `limit` at most; a larger one has a run of its own."""
    runs: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not runs or filled + size > limit:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += size
    return runs


def grown(scratch: Tensor, size: int) -> Tensor:
    """Memory (uint8) of at least `size` bytes: scratch, or other on its device in its place."""
    return scratch if len(scratch) >= size else torch.empty(size, dtype=torch.uint8, device=scratch.device)


def pack(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, scratch: Tensor) -> tuple[WeightBucket, Tensor]:
    """Copies tensors, cast to dtype, into the beginning of scratch (uint8); what they are, and the bytes used [n]."""
    names, shapes, digests, start = [], [], [], 0
    for name, tensor in weights:
        shape = tuple(tensor.shape)
        target = _view(scratch, start, shape, dtype)
        target.copy_(tensor.detach())
        names.append(name)
        shapes.append(shape)
        digests.append(digest(target))
        start += _size(shape, dtype)
    return WeightBucket(tuple(names), tuple(shapes), tuple(digests)), scratch[:start]


def unpack(bucket: WeightBucket, flat: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names and views into the bytes [n] of a bucket. ValueError if they are too few or too many."""
    if len(flat) != (size := nbytes(bucket.shapes, dtype)):
        raise ValueError(f"a bucket of {size} bytes arrived with {len(flat)}")
    start = 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        yield name, _view(flat, start, shape, dtype)
        start += _size(shape, dtype)


def nbytes(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of tensors that are packed into one bucket."""
    return sum(_size(shape, dtype) for shape in shapes)


def held_bucket(bucket: WeightBucket, weights: Mapping[str, Tensor]) -> WeightBucket:
    """The bucket as a model's own weights make it: equal to the published one if the model holds that."""
    tensors = [weights[name] for name in bucket.names]
    return WeightBucket(bucket.names, tuple(tuple(t.shape) for t in tensors), tuple(digest(t) for t in tensors))


def as_tensor(buffer: NDArray[np.uint8]) -> Tensor:
    """The memory of the object store, which may only be read, as a tensor [n] to copy from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(buffer)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-int(np.prod(shape)) * dtype.itemsize // WORD) * WORD


def _view(flat: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return flat[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).view(shape)
