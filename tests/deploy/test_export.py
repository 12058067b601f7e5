"""A run's checkpoint as other programs load it: the released layout, vLLM's and diffusers'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from golden_numbers import CHECKPOINT, close, golden, tensor
from safetensors.torch import load_file

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.checkpoint_files import CheckpointError
from common.config import ConfigError
from common.rundir import RunDirectory
from deploy.export import export
from learner import checkpoint as run_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, golden_checkpoint: Checkpoint) -> RunDirectory:
    """A run with two checkpoints of a policy that trained away from its start."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "trained").create("run_name: trained\n")
    generator = torch.Generator().manual_seed(0)
    for step in (2, 4):
        masters = {
            f"master.{name}": p.detach() + step * 1e-2 * torch.randn(p.shape, generator=generator)
            for pairs in golden_checkpoint.policy.parameter_groups().values()
            for name, p in pairs
        }
        weights = golden_checkpoint.policy.state_dict()
        run_checkpoint.write(run.checkpoint(step), golden_checkpoint, weights, masters, {"step": step}, keep=5)
    return run


@pytest.fixture(scope="module")
def exported(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("export") / "model")


@torch.no_grad()
def test_the_export_is_the_newest_checkpoint(run: RunDirectory, exported: Path) -> None:
    trained, start = run.checkpoint(4) / "policy", load_file(CHECKPOINT / store.WEIGHTS)
    found, wanted = load_file(exported / store.WEIGHTS), load_file(trained / store.WEIGHTS)
    assert found.keys() == wanted.keys() == start.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert not torch.equal(found[store.HEAD], start[store.HEAD])
    numbers = golden("bagel/velocity.npz")
    grid = tuple(numbers["s0_grid_hw"].tolist())
    velocities = []
    for directory in (exported, trained):
        policy = store.load(directory).policy
        context = policy.prefill([numbers["ctx_prompt_ids"].tolist()])
        velocities.append(policy.velocity(tensor(numbers["cfg_x"])[None], tensor(numbers["ts"][[1]]), context, grid))
    assert torch.equal(*velocities)
    assert json.loads((exported / "export.json").read_text())["step"] == 4


@torch.no_grad()
def test_diffusers_loads_the_autoencoder(exported: Path) -> None:
    numbers = golden("bagel/vae.npz")
    vae = AutoencoderKL.from_pretrained(exported / "vae")
    scale, shift = numbers["scale_shift"].tolist()
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (scale, shift)
    close(vae.decode(tensor(numbers["latent"]) / scale + shift).sample, numbers["decoded"])


@torch.no_grad()
def test_vllm_loads_the_reasoner(exported: Path) -> None:
    from rollout.reasoner import Reasoner

    loaded = store.load(exported)
    ids = golden("bagel/text.npz")["c_ids"].tolist()
    reasoner = Reasoner(exported / "reasoner", eos_token_id=loaded.chat.end, max_model_len=len(ids) + 2, max_batch=2)
    try:
        close(reasoner.probe(ids), loaded.policy.token_logprobs([ids])[0], atol=1e-5)
    finally:
        reasoner.close()
    assert (exported / "reasoner/tokenizer.json").read_bytes() == (CHECKPOINT / "tokenizer.json").read_bytes()


def test_generate_draws_from_an_export(exported: Path, tmp_path: Path) -> None:
    from PIL import Image

    side = 4 * store.BagelConfig.read(exported).pixels_per_token
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"height": side, "width": side},
                "sampling": {"max_tokens": 4},
                "evaluation": {"points": 4, "cfg": {"text_scale": 4.0, "image_scale": 1.5}},
            }
        )
    )
    command = [str(Path(sys.executable).with_name("unigrpo")), "generate", str(exported), "a red circle", "-n", "2"]
    out = tmp_path / "images"
    done = subprocess.run(
        [*command, "-o", str(out), "--recipe", str(recipe)], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array(Image.open(out / "image-1.png")).shape == (side, side, 3)


def test_a_step_and_a_rounded_type(run: RunDirectory, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", step=2, dtype="bfloat16")
    found, masters = load_file(out / store.WEIGHTS), load_file(run.checkpoint(2) / "policy" / store.WEIGHTS)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in masters.items())
    reasoner = load_file(out / "reasoner/model.safetensors")
    assert torch.equal(reasoner["lm_head.weight"], found[store.HEAD])
    assert store.check(out) == store.check(CHECKPOINT)
    assert json.loads((out / "export.json").read_text()) == {"run": "trained", "step": 2, "dtype": "bfloat16"}


def test_what_cannot_be_exported(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="taken exists already"):
        export(run, tmp_path / "taken")
    with pytest.raises(ConfigError, match=r"--step is 3, but \S+ has checkpoints of steps \[2, 4\]"):
        export(run, tmp_path / "out", step=3)
    empty = RunDirectory(tmp_path / "empty").create("run_name: empty\n")
    with pytest.raises(ConfigError, match="empty has no whole checkpoint yet"):
        export(empty, tmp_path / "out")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["empty", "taken"]


def test_a_damaged_checkpoint(run: RunDirectory, tmp_path: Path) -> None:
    import shutil

    damaged = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "damaged")))
    weights = damaged.checkpoint(4) / "policy" / store.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{store.WEIGHTS} is missing or damaged"):
        export(damaged, tmp_path / "out", step=4)
    assert json.loads((export(damaged, tmp_path / "out") / "export.json").read_text())["step"] == 2
