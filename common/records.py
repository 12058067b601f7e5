"""Rollouts on disk: groups with their rewards and advantages as Parquet, one row per chain.

With the window's latents a file restores its groups exactly, and a step can be replayed into the learner without any
rollout. Without them the images and the reasoning are still exact, and the image segments hold K = 0 steps.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from common.rundir import replacing
from common.types import Chain, Group, ImageSegment, Prompt, RolloutStats, TextSegment

_LATENTS = ("x_t", "x_next", "v_old")

SCHEMA = pa.schema(
    {
        "group": pa.int32(),
        "chain": pa.int32(),
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "metadata": pa.string(),
        "step": pa.int64(),
        "seed": pa.int64(),
        "prompt_ids": pa.list_(pa.int64()),
        "reasoning_ids": pa.list_(pa.int64()),
        "reasoning_logprobs": pa.list_(pa.float32()),
        "reasoning_text": pa.string(),
        "finished": pa.bool_(),
        "text_version": pa.int64(),
        "image_version": pa.int64(),
        "png": pa.binary(),
        "grid": pa.list_(pa.int32(), 2),
        "t": pa.list_(pa.float32()),
        "t_next": pa.list_(pa.float32()),
        "reward": pa.float32(),
        "rewards": pa.map_(pa.string(), pa.float32()),
        "advantage": pa.float32(),
        "latent_shape": pa.list_(pa.int32(), 3),
        **{name: pa.large_binary() for name in _LATENTS},
    }
)
"""One row per chain, the chains of a group in order. metadata is JSON; rewards are by scorer, NaN where it could not
score; x_t, x_next and v_old are little-endian fp32 of latent_shape [K, N, D], null without latents."""


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """[H, W, 3] uint8 -> PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(png: bytes) -> NDArray[np.uint8]:
    """PNG -> [H, W, 3] uint8."""
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def write_groups(
    path: Path,
    groups: Sequence[Group],
    rewards: ArrayLike,
    by_scorer: Mapping[str, ArrayLike],
    advantages: ArrayLike,
    latents: bool,
) -> None:
    """Writes B groups of G chains atomically.

    rewards and advantages are [B, G], by_scorer maps a scorer's name to [B, G]; all are kept as fp32, NaN for a
    masked chain. latents also keeps the window's x_t, x_next and v_old. ValueError for a shape that does not fit, and
    for a chain that is not one reasoning followed by one image.
    """
    shape = (len(groups), len(groups[0].chains) if groups else 0)
    named = {"rewards": rewards, "advantages": advantages} | {f"by_scorer {k}": v for k, v in by_scorer.items()}
    for name, values in named.items():
        if np.shape(values) != shape or any(len(group.chains) != shape[1] for group in groups):
            raise ValueError(f"{name} has the shape {np.shape(values)}; {shape[0]} groups of equal size need {shape}")
    total, advantage = np.asarray(rewards, np.float32), np.asarray(advantages, np.float32)
    scored = {name: np.asarray(values, np.float32) for name, values in by_scorer.items()}
    with replacing(path) as aside, pq.ParquetWriter(aside, SCHEMA, compression="zstd") as writer:
        for b, group in enumerate(groups):
            rows = [
                _row(group, chain, latents)
                | {
                    "group": b,
                    "chain": g,
                    "reward": total[b, g],
                    "rewards": [(name, values[b, g]) for name, values in scored.items()],
                    "advantage": advantage[b, g],
                }
                for g, chain in enumerate(group.chains)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def read_groups(path: Path) -> list[tuple[Group, NDArray[np.float32], NDArray[np.float32]]]:
    """What `write_groups` wrote: every group with its rewards [G] and advantages [G], fp32."""
    with pq.ParquetFile(path) as file:
        return [_group(list(rows)) for _, rows in groupby(_rows(file), key=lambda row: row["group"])]


def index_groups(path: Path) -> list[tuple[str, tuple[int, ...], RolloutStats]]:
    """Of every group of a file: its prompt's id, its chains' seeds, and how it was made, less the times. Reads no image
    and no latents."""
    columns = ["group", "prompt_id", "seed", "text_version", "image_version", "reasoning_ids", "finished"]
    rows = pq.read_table(path, columns=columns).to_pylist()
    index = []
    for _, group in groupby(rows, key=lambda row: row["group"]):
        chains = list(group)
        tokens = sum(len(chain["reasoning_ids"]) for chain in chains)
        cut = sum(not chain["finished"] for chain in chains)
        oldest = min(chain[key] for chain in chains for key in ("text_version", "image_version"))
        stats = RolloutStats(oldest, len(chains), tokens, cut, 0.0, 0.0, 0.0)
        index.append((chains[0]["prompt_id"], tuple(chain["seed"] for chain in chains), stats))
    return index


def _row(group: Group, chain: Chain, latents: bool) -> dict[str, Any]:
    match chain.segments:
        case (TextSegment() as text, ImageSegment() as image):
            pass
        case _:
            kinds = [type(segment).__name__ for segment in chain.segments]
            raise ValueError(
                f"a chain of prompt {group.prompt.id} has the segments {kinds}; only one TextSegment followed by one "
                "ImageSegment can be recorded"
            )
    return {
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "metadata": json.dumps(dict(group.prompt.metadata)),
        "step": group.step,
        "seed": chain.seed,
        "prompt_ids": text.prompt_ids,
        "reasoning_ids": text.ids,
        "reasoning_logprobs": text.logprobs,
        "reasoning_text": text.text,
        "finished": text.finished,
        "text_version": text.version,
        "image_version": image.version,
        "png": encode_png(image.pixels),
        "grid": image.grid,
        "t": image.t,
        "t_next": image.t_next,
        "latent_shape": image.x_t.shape,
        **{name: getattr(image, name).astype("<f4").tobytes() if latents else None for name in _LATENTS},
    }


def _rows(file: pq.ParquetFile) -> Iterable[dict[str, Any]]:
    for batch in file.iter_batches(batch_size=64):
        yield from batch.to_pylist()


def _group(rows: list[dict[str, Any]]) -> tuple[Group, NDArray[np.float32], NDArray[np.float32]]:
    first = rows[0]
    prompt = Prompt(first["prompt_id"], first["prompt"], json.loads(first["metadata"]))
    group = Group(prompt, first["step"], tuple(_chain(row) for row in rows))
    rewards, advantages = (np.array([row[key] for row in rows], np.float32) for key in ("reward", "advantage"))
    return group, rewards, advantages


def _chain(row: dict[str, Any]) -> Chain:
    text = TextSegment(
        prompt_ids=np.array(row["prompt_ids"], np.int64),
        ids=np.array(row["reasoning_ids"], np.int64),
        logprobs=np.array(row["reasoning_logprobs"], np.float32),
        finished=row["finished"],
        text=row["reasoning_text"],
        version=row["text_version"],
    )
    kept = row["x_t"] is not None
    steps, tokens, width = row["latent_shape"]
    shape = (steps if kept else 0, tokens, width)
    image = ImageSegment(
        **{name: np.frombuffer(row[name] or b"", "<f4").reshape(shape).astype(np.float32) for name in _LATENTS},
        t=np.array(row["t"] if kept else [], np.float32),
        t_next=np.array(row["t_next"] if kept else [], np.float32),
        pixels=decode_png(row["png"]),
        grid=(row["grid"][0], row["grid"][1]),
        version=row["image_version"],
    )
    return Chain((text, image), row["seed"])
