"""Run checkpoints: whole or absent, a bounded number of them, and no damaged byte is resumed from."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.checkpoint_files import CheckpointError
from learner import checkpoint as run_checkpoint

BIAS = "vae2llm.bias"


@pytest.fixture
def masters(golden_checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """fp32 masters and moments as the engine hands them over, other than the policy's own weights."""
    out = {}
    for pairs in golden_checkpoint.policy.parameter_groups().values():
        for name, p in pairs:
            out[f"master.{name}"] = p.detach() + 1e-4
            out[f"exp_avg.{name}"] = torch.full_like(p.detach(), 0.5)
            out[f"exp_avg_sq.{name}"] = torch.full_like(p.detach(), 0.25)
    return out


def write(
    directory: Path, policy: Checkpoint, masters: dict[str, torch.Tensor], step: int, keep: int = 2, **state: float
) -> Path:
    target = directory / f"step-{step:06d}"
    state |= {"step": step, "optimizer_steps": 2 * step}
    run_checkpoint.write(target, policy, policy.policy.state_dict(), masters, state, keep)
    return target


def test_what_is_written_is_what_is_read(
    golden_checkpoint: Checkpoint, masters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    written = write(tmp_path, golden_checkpoint, masters, 20)
    assert run_checkpoint.verify(written) == {"step": 20, "optimizer_steps": 40}
    found = run_checkpoint.read_optimizer(written)
    assert found.keys() == masters.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in masters.items())
    # The policy in it is a checkpoint like any other, and holds the masters.
    policy = store.load(written / "policy").policy.state_dict()
    assert torch.equal(policy[BIAS], masters[f"master.{BIAS}"])
    assert torch.equal(policy["latent_pos_embed.pos_embed"], golden_checkpoint.policy.latent_pos_embed.pos_embed)


def test_every_file_is_in_the_manifest(
    golden_checkpoint: Checkpoint, masters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    written = write(tmp_path, golden_checkpoint, masters, 1)
    manifest = json.loads((written / "manifest.json").read_text())
    files = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()}
    assert manifest.keys() == files - {"manifest.json"}
    assert {"optimizer.safetensors", "state.json", "policy/ema.safetensors", "policy/ae.safetensors"} <= files


def test_the_newest_and_the_best_are_kept(
    golden_checkpoint: Checkpoint, masters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for step, reward in ((5, 0.3), (10, 0.9), (15, 0.4), (100, 0.5)):
        write(tmp_path, golden_checkpoint, masters, step, reward=reward)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015", "step-000100"]
    write(tmp_path, golden_checkpoint, masters, 101, keep=1, reward=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000101"]


def test_a_damaged_checkpoint_is_written_again(
    golden_checkpoint: Checkpoint, masters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    damaged = write(tmp_path, golden_checkpoint, masters, 5)
    (damaged / "state.json").write_text("{}")
    run_checkpoint.verify(write(tmp_path, golden_checkpoint, masters, 5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_an_interrupted_write_is_never_taken(
    golden_checkpoint: Checkpoint,
    masters: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Failed at any file: the older checkpoint stays, and nothing is left of the new one, not even used space."""
    older = write(tmp_path, golden_checkpoint, masters, 5, keep=1)
    real = run_checkpoint.sha256
    calls = []

    def dies(path: Path) -> str:
        calls.append(path)
        if len(calls) == 3:
            raise OSError("no space left on device")
        return real(path)

    monkeypatch.setattr(run_checkpoint, "sha256", dies)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, golden_checkpoint, masters, 10, keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]
    run_checkpoint.verify(older)
    # What a kill leaves the next checkpoint clears away.
    (tmp_path / "step-000007.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        run_checkpoint.verify(tmp_path / "step-000007.partial")
    write(tmp_path, golden_checkpoint, masters, 10, keep=1, reward=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]


def test_what_an_interrupted_write_left_is_neither_resumed_from_nor_counted(
    golden_checkpoint: Checkpoint, masters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    left = tmp_path / "step-000010.partial"
    write(tmp_path, golden_checkpoint, masters, 10).rename(left)  # died just before the renaming
    (tmp_path / "step-000011").mkdir()  # without a manifest
    for step in (5, 7):
        written = write(tmp_path, golden_checkpoint, masters, step, keep=1)
        assert run_checkpoint.newest_whole(tmp_path) == (written, run_checkpoint.verify(written))


@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "state.json", "policy/ema.safetensors", "policy/tokenizer.json"]
)
def test_one_damaged_byte_is_detected_with_the_name_of_its_file(
    golden_checkpoint: Checkpoint, masters: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    written = write(tmp_path, golden_checkpoint, masters, 1)
    content = bytearray((written / name).read_bytes())
    content[len(content) // 2] ^= 1
    (written / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{written / name} is missing or damaged; resume from")):
        run_checkpoint.verify(written)
    (written / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{written / name} is missing or damaged")):
        run_checkpoint.verify(written)


def test_masters_are_saved_without_rounding(
    golden_checkpoint: Checkpoint, masters: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A policy that computes in bf16 is written with its fp32 masters."""
    from golden_numbers import CHECKPOINT

    written = write(tmp_path, store.load(CHECKPOINT, torch.bfloat16), masters, 1)
    saved = load_file(written / "policy" / store.WEIGHTS)
    for name, tensor in saved.items():
        if f"master.{name}" in masters:
            assert torch.equal(tensor, masters[f"master.{name}"]), name


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        target = tmp_path / f"step-{step:06d}"
        target.mkdir()
        (target / "state.json").write_text(json.dumps({"step": step}))
        digest = hashlib.sha256((target / "state.json").read_bytes()).hexdigest()
        (target / "manifest.json").write_text(json.dumps({"state.json": digest}))
    found = run_checkpoint.newest_whole(tmp_path)
    assert found is not None and found[1]["step"] == 1_000_000
    (tmp_path / "step-1000000" / "state.json").write_text("{}")
    found = run_checkpoint.newest_whole(tmp_path)
    assert found is not None and found[1]["step"] == 999_999
    (tmp_path / "step-999999" / "state.json").unlink()
    assert run_checkpoint.newest_whole(tmp_path) is None


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_manifest_cannot_lead_out_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "step-000005"
    directory.mkdir()
    (tmp_path / "secret").write_text("x")
    (directory / "manifest.json").write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(CheckpointError, match=rf"names {name}, outside the checkpoint"):
        run_checkpoint.verify(directory)
