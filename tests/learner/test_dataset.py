"""Supervised examples: what of the text is left out, and that such examples train."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import pack_batch
from common.config import REPOSITORY, ConfigError
from learner.dataset import check_parquet, encode_pairs, parquet_pairs, shapes_pairs
from learner.sft import losses


@pytest.fixture(scope="module")
def shapes_checkpoint() -> Checkpoint:
    return store.load(REPOSITORY / "deploy" / "models" / "shapes")


def test_shares_leave_text_out_and_change_no_picture() -> None:
    whole, some = shapes_pairs(400, 7), shapes_pairs(400, 7, think_share=0.5, prompt_share=0.8)
    assert all(prompt and reasoning for prompt, reasoning, _ in whole)
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(whole, some, strict=True))
    kinds = [(bool(prompt), reasoning is not None) for prompt, reasoning, _ in some]
    shares = [kinds.count(kind) / 400 for kind in ((False, False), (True, False), (True, True), (False, True))]
    assert shares == pytest.approx([0.2, 0.4, 0.4, 0], abs=0.07)
    assert shapes_pairs(20, 7, think_share=0)[0][1] is None


def test_contexts_are_those_of_the_rollout_and_of_guidance(shapes_checkpoint: Checkpoint) -> None:
    chat, image = shapes_checkpoint.chat, np.full((32, 32, 3), 128, np.uint8)
    reasoning = "<think> a red circle. plan: red circle top left. </think>"
    pairs = [("draw a red circle", reasoning, image), ("draw a red circle", None, image), ("", None, image)]
    examples = encode_pairs(pairs, shapes_checkpoint, "")
    prompt = chat.prompt_ids("draw a red circle")
    response = [*chat.encode(reasoning), chat.end]
    assert examples.texts == [chat.context_ids(prompt, response), *reversed(chat.cfg_ids("draw a red circle"))]
    first, *others = examples.scored
    assert first == (len(prompt), len(prompt) + len(response))
    assert all(start == end for start, end in others)

    t = torch.tensor([0.5, 0.5, 0.5])
    batch = pack_batch(examples.texts, examples.scored, examples.latents, t, torch.arange(3), examples.grid)
    total, text, picture = losses(shapes_checkpoint.policy(batch), torch.zeros_like(examples.latents), 1.0)
    total.backward()
    assert text.isfinite() and picture.isfinite()
    silent, latents = (examples.texts[1:], examples.scored[1:]), examples.latents[1:]
    alone = pack_batch(*silent, latents, t[1:], torch.arange(2), examples.grid)
    total, text, picture = losses(shapes_checkpoint.policy(alone), torch.zeros_like(latents), 1.0)
    assert text == 0 and total == picture > 0, "no text to learn is no reason for a loss that is not a number"
    assert all(p.grad is None or p.grad.isfinite().all() for p in shapes_checkpoint.policy.parameters())


def test_parquet_rows_may_have_no_reasoning(tmp_path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    columns = {"prompt": ["a", "b", ""], "reasoning": ["<think>", None, None], "image": [buffer.getvalue()] * 3}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    pairs = parquet_pairs(tmp_path / "x.parquet", 16, 16)
    assert [(prompt, reasoning) for prompt, reasoning, _ in pairs] == [("a", "<think>"), ("b", None), ("", None)]
    assert pairs[0][2].shape == (16, 16, 3)
    check_parquet(tmp_path / "x.parquet", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": [b"no picture"]}, "row 0: image cannot be read"),
        ({"prompt": [None]}, "row 0: prompt must be text"),
        ({"prompt": [3]}, "row 0: prompt must be text"),
        ({"reasoning": None}, "column reasoning is missing"),
        ({}, "has 1 rows, fewer than one step's 2 texts"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    columns = {"prompt": ["a"], "reasoning": ["b"], "image": [b""]} | changes
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=message):
        check_parquet(tmp_path / "x.parquet", 1 if changes else 2)
        parquet_pairs(tmp_path / "x.parquet", 16, 16)


def test_what_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("prompt,reasoning,image")
    for path in (tmp_path / "x.parquet", tmp_path / "none.parquet"):
        with pytest.raises(ConfigError, match=rf"{path.name} is not readable Parquet"):
            check_parquet(path, 1)
