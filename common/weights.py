"""Weights as one flat buffer with a manifest: what a learner publishes and a replica loads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.types import WeightManifest


def pack(weights: Iterable[tuple[str, Tensor]], version: int, dtype: torch.dtype) -> tuple[WeightManifest, NDArray]:
    """Concatenates tensors, cast to dtype, into bytes uint8 [nbytes] with the manifest that describes them."""
    names, shapes, parts = [], [], []
    for name, tensor in weights:
        names.append(name)
        shapes.append(tuple(tensor.shape))
        parts.append(tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8))
    buffer = torch.cat(parts).numpy()
    manifest = WeightManifest(
        version, checksum(buffer), tuple(names), tuple(shapes), str(dtype).removeprefix("torch."), buffer.nbytes
    )
    return manifest, buffer


def unpack(manifest: WeightManifest, buffer: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Views into the buffer, by name. ValueError if the buffer is not the one the manifest describes."""
    found = checksum(buffer)
    if found != manifest.checksum:
        raise ValueError(f"weights version {manifest.version} arrived with checksum {found}, not {manifest.checksum}")
    dtype = getattr(torch, manifest.dtype)
    # The object store hands out read-only memory; the views are only ever copied from.
    buffer = buffer if buffer.flags.writeable else np.array(buffer)
    flat = torch.from_numpy(buffer).view(dtype)
    sizes = [int(np.prod(shape)) for shape in manifest.shapes]
    parts = flat.split(sizes)
    return {n: p.view(s) for n, p, s in zip(manifest.names, parts, manifest.shapes, strict=True)}


def checksum(buffer: NDArray[np.uint8]) -> str:
    """BLAKE2b of the bytes."""
    return hashlib.blake2b(np.ascontiguousarray(buffer).data, digest_size=16).hexdigest()


def checksum_of(weights: Mapping[str, Tensor], manifest: WeightManifest) -> str:
    """The checksum that weights held by a model would be published with; equal to the manifest's if they are it."""
    ordered = ((name, weights[name]) for name in manifest.names)
    return pack(ordered, manifest.version, getattr(torch, manifest.dtype))[0].checksum
