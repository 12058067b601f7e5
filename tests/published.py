"""Weights as a learner publishes them, for tests without one."""

from __future__ import annotations

from collections.abc import Mapping

import ray
import torch

from common.types import WeightManifest
from common.weights import pack, plan


def publish(
    weights: Mapping[str, torch.Tensor], version: int, limit: int = 1 << 20
) -> tuple[WeightManifest, list[ray.ObjectRef]]:
    """Manifest and references to the bytes of fp32 buckets."""
    names = plan({name: tuple(tensor.shape) for name, tensor in weights.items()}, torch.float32, limit)
    scratch = torch.empty(1 << 27, dtype=torch.uint8)
    buckets, buffers = [], []
    for part in names:
        bucket, flat = pack(((name, weights[name]) for name in part), torch.float32, scratch)
        buckets.append(bucket)
        buffers.append(ray.put(flat.numpy()))
    return WeightManifest(version, "float32", tuple(buckets)), buffers
