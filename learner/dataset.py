"""Supervised examples: drawn from the shapes task, or read from a Parquet file of prompt, reasoning and image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import pixels_to_tokens
from common.config import ConfigError
from common.shapes import prompts as shapes_prompts
from common.shapes.scene import render
from common.shapes.supervised import example
from learner.sft import Examples

Pair = tuple[str, str | None, np.ndarray]
"""Prompt (empty: none), reasoning (None: the image follows the prompt), image uint8 [H, W, 3]."""


def shapes_pairs(count: int, seed: int, think_share: float = 1.0, prompt_share: float = 1.0) -> list[Pair]:
    """Examples of the careless annotator on the training prompts, every tag equally often. The shares decide what of
    the text is left out, never which scene is drawn."""
    rng, left_out = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    by_tag: dict[str, list[dict]] = {}
    for record in shapes_prompts.load(shapes_prompts.DATA / "train.jsonl"):
        by_tag.setdefault(record["tag"], []).append(record)
    # Riddles have many phrases to learn, so they get the share of two tags.
    tags = [*by_tag, "reasoning"]
    pairs: list[Pair] = []
    for k in range(count):
        pool = by_tag[tags[k % len(tags)]]
        record = pool[rng.integers(len(pool))]
        reasoning, scene = example(record, rng)
        image = render(scene, rng)
        if left_out.random() >= prompt_share:
            pairs.append(("", None, image))
        else:
            pairs.append((record["prompt"], reasoning if left_out.random() < think_share else None, image))
    return pairs


def check_parquet(path: Path, fewest: int) -> None:
    """ConfigError for a file that is no Parquet, lacks a column or has fewer rows than that; images are not opened."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data: {path} is not readable Parquet ({error})") from error
    columns = file.schema_arrow.names
    for column in ("prompt", "reasoning", "image"):
        if column not in columns:
            raise ConfigError(f"data: {path}: column {column} is missing (it has {', '.join(columns)})")
    if file.metadata.num_rows < fewest:
        raise ConfigError(
            f"data: {path} has {file.metadata.num_rows} rows, fewer than one step's {fewest} texts (batch x ranks); "
            "lower batch or ranks"
        )


def parquet_pairs(path: Path, height: int, width: int) -> list[Pair]:
    """Rows with columns prompt, reasoning and image (PNG or JPEG bytes), resized to the training size.

    ConfigError naming the file and the row that cannot be used.
    """
    pairs = []
    for number, row in enumerate(pq.read_table(path, columns=["prompt", "reasoning", "image"]).to_pylist()):
        if not isinstance(row["prompt"], str) or not isinstance(row["reasoning"], str | None):
            raise ConfigError(f"data: {path}: row {number}: prompt must be text, reasoning text or null")
        try:
            image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        except (OSError, TypeError) as error:
            raise ConfigError(f"data: {path}: row {number}: image cannot be read ({error})") from error
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        pairs.append((row["prompt"], row["reasoning"], pixels))
    return pairs


@torch.no_grad()
def encode_pairs(pairs: list[Pair], checkpoint: Checkpoint, system_prompt: str, batch: int = 64) -> Examples:
    """Token ids and clean latents of every pair (computed once; the set stays in memory)."""
    chat = checkpoint.chat
    texts, scored = [], []
    for prompt, reasoning, _ in pairs:
        if reasoning is None:
            text = head = chat.cfg_ids(prompt, system_prompt)[1]
        else:
            head = chat.prompt_ids(prompt, system_prompt)
            text = [*head, *chat.encode(reasoning), chat.end]
        texts.append(text)
        scored.append((len(head), len(text)))
    chunks = [np.stack([image for *_, image in pairs[i : i + batch]]) for i in range(0, len(pairs), batch)]
    device = checkpoint.policy.device
    latents = [pixels_to_tokens(checkpoint.vae, checkpoint.config, torch.from_numpy(c).to(device)) for c in chunks]
    height, width = pairs[0][2].shape[:2]
    return Examples(texts, scored, torch.cat(latents).cpu(), checkpoint.config.grid(height, width))
