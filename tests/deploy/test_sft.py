"""`unigrpo sft` from a checkpoint and a Parquet file, as a user types it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from golden_numbers import CHECKPOINT
from PIL import Image
from safetensors.torch import load_file

from common.bagel.checkpoint import check


def sft(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "sft", "shapes-sft", "create=null", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def test_a_checkpoint_is_trained_on_examples_of_ones_own(tmp_path: Path) -> None:
    def png(red: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((20, 30, 3), (red, 0, 0), np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    file, out = tmp_path / "own.parquet", tmp_path / "out"
    rows = {"prompt": [f"red {i}" for i in range(6)], "reasoning": ["a plan", None] * 3}
    pq.write_table(pa.table({**rows, "image": [png(40 * i) for i in range(6)]}), file)
    given = (f"start={CHECKPOINT}", f"data={file}", f"out={out}", "steps=2", "batch=2", "copies=2", "cpus=0.5")
    result = sft(*given)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"checkpoint: {out}" in result.stdout
    assert check(out) == check(CHECKPOINT)
    before, after = (load_file(path / "ema.safetensors") for path in (CHECKPOINT, out))
    assert before.keys() == after.keys()
    moved = [name for name in before if not before[name].float().equal(after[name].float())]
    assert any("moe_gen" in name for name in moved) and any("moe_gen" not in name for name in moved)

    # What is there already is not written over; a picture that is none is named with its row and node.
    assert f"out: {out} exists already" in sft(*given).stderr
    pq.write_table(pa.table({**rows, "image": [png(0)] * 5 + [b"no picture"]}), file)
    result = sft(*given, f"out={tmp_path / 'other'}")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "own.parquet: row 5: image cannot be read" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "other").exists()
