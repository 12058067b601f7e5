"""Bad input is one line that names the thing, the value and the remedy, with exit code 2, before anything starts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.config import REPOSITORY, TrainConfig
from common.policy import directories
from common.recipe import load_config, to_yaml
from common.rundir import RunDirectory, replacing_directory
from deploy import cli
from deploy.preflight import trained_names
from learner.checkpoint import MANIFEST, identity

MODEL = REPOSITORY / "deploy" / "models" / "shapes"


def attempt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command line; its one line of error."""
    monkeypatch.setattr(sys, "argv", ["unigrpo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and "Traceback" not in error
    return error


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(MODEL, target)
    return target


def test_unknown_key_suggests_the_known_one(monkeypatch, capsys) -> None:
    error = attempt(monkeypatch, capsys, "train", "shapes", "optimizer.lr_denoisng=1e-4", "--dry-run")
    assert "optimizer.lr_denoisng" in error and "lr_denoising" in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"steps: 5\nsteps: 7\n", "is not valid YAML: steps is there twice"),
        (b"run_name: \xe9\n", "is not UTF-8 text"),
        (b"model: &a [*a]\n", "is not valid YAML: "),
        (b"rewards: !!set {a, b}\n", "is not valid YAML: could not determine a constructor"),
        (b"1: 2\n", "is not valid YAML: 1 is no name of a field"),
        (b"objective: {image_clip: 0}\n", "objective.image_clip is 0: "),
        (
            b"recording: {trackers: wandb}\n",
            "recording.trackers is 'wandb': Input should be a valid tuple; give a list",
        ),
        (b"run_name: 7\n", "run_name is 7: Input should be a valid string; put it in quotes"),
        (b"seed: 4294967296\n", "seed is 4294967296: Input should be less than"),
        (b"out: x\n", "is one of supervised fine-tuning; it is for `unigrpo sft"),
    ],
)
def test_a_recipe_that_cannot_be_read(monkeypatch, capsys, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    assert said in attempt(monkeypatch, capsys, "train", str(tmp_path / "mine.yaml"), "--dry-run")


def test_a_date_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run_name: 2024-01-01\n")
    assert load_config(str(tmp_path / "mine.yaml")).run_name == "2024-01-01"
    assert load_config("shapes", ["run_name=2024-01-02"]).run_name == "2024-01-02"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "shapes", "runs_dir=FILE/runs"),
        ("eval", str(MODEL), "runs_dir=FILE/runs"),
        ("generate", str(MODEL), "a red circle", "-o", "FILE/images"),
        ("sft", "shapes-sft", "out=FILE/model"),
        ("reproduce", "--rows", "sft", "--out", "FILE/out"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_where_nothing_can_be_written(monkeypatch, capsys, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    error = attempt(monkeypatch, capsys, *(a.replace("FILE", str(tmp_path / "file")) for a in arguments))
    assert f"nothing can be written into {tmp_path / 'file'}" in error and "give another directory" in error


def test_a_trial_does_not_take_the_place_of_the_committed_cells(monkeypatch, capsys) -> None:
    for own in ("evaluation.prompts=7", "--steps=3"):
        assert "give --out a directory of its own" in attempt(monkeypatch, capsys, "reproduce", own, "--rows", "sft")


def test_eval_of_a_run_names_its_policy(monkeypatch, capsys, tmp_path: Path) -> None:
    run = checkpointed(tmp_path / "mine", load_config("shapes"))
    policy = run.checkpoint(20) / "policy"
    assert f"is a run directory; give one of its policies, {policy}" in attempt(
        monkeypatch, capsys, "eval", str(run.path)
    )
    policy.mkdir()
    assert f"give the policy in it, {policy}" in attempt(monkeypatch, capsys, "eval", str(run.checkpoint(20)))
    shutil.rmtree(run.checkpoints)
    assert "it has no checkpoint yet" in attempt(monkeypatch, capsys, "generate", str(run.path), "a red circle")


def test_resume_of_a_run_with_a_broken_file(monkeypatch, capsys, tmp_path: Path) -> None:
    run = checkpointed(tmp_path / "mine", load_config("shapes"))
    run.metrics.write_text('{"step": 0\n{"step": 1}\n')
    assert "metrics.jsonl, line 1 is not a JSON" in attempt(monkeypatch, capsys, "train", "--resume", str(run.path))
    assert "metrics.jsonl, line 1 is not a JSON" in attempt(monkeypatch, capsys, "report", str(run.path))


def test_impossible_batch_arithmetic(monkeypatch, capsys) -> None:
    error = attempt(monkeypatch, capsys, "train", "shapes", "data.prompts_per_step=7", "--dry-run")
    assert "7" in error and "multiple of 2" in error


def test_missing_checkpoint(monkeypatch, capsys) -> None:
    assert "nowhere" in attempt(monkeypatch, capsys, "train", "shapes", "model.path=nowhere")


def test_eval_of_a_missing_checkpoint_or_prompt_file(monkeypatch, capsys) -> None:
    assert "nowhere" in attempt(monkeypatch, capsys, "eval", "nowhere")
    error = attempt(monkeypatch, capsys, "eval", str(MODEL), "data.heldout=missing.jsonl")
    assert "missing.jsonl" in error


def test_truncated_checkpoint(monkeypatch, capsys, broken_model: Path) -> None:
    weights = broken_model / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = attempt(monkeypatch, capsys, "train", "shapes", f"model.path={broken_model}")
    assert "ema.safetensors" in error and "truncated" in error


def test_checkpoint_without_tokenizer(monkeypatch, capsys, broken_model: Path) -> None:
    (broken_model / "tokenizer.json").unlink()
    assert "tokenizer.json" in attempt(monkeypatch, capsys, "generate", str(broken_model), "a red circle")


def test_broken_prompt_line(monkeypatch, capsys, tmp_path: Path) -> None:
    lines = (REPOSITORY / "common/shapes/data/train.jsonl").read_text().splitlines()[:20]
    lines[4] = lines[4][:-3]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    error = attempt(monkeypatch, capsys, "train", "shapes", f"data.train={path}")
    assert "prompts.jsonl" in error and "line 5" in error


def test_prompt_that_the_scorer_cannot_judge(monkeypatch, capsys, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]}\n' * 1)
    error = attempt(monkeypatch, capsys, "train", "shapes", f"data.train={path}", "data.prompts_per_step=2")
    assert "prompts.jsonl" in error


def test_unknown_reward(monkeypatch, capsys) -> None:
    error = attempt(monkeypatch, capsys, "train", "shapes", "rewards.0.name=shape")
    assert "shape" in error and "shapes" in error


def test_existing_run_directory(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    error = attempt(monkeypatch, capsys, "train", "shapes", f"runs_dir={tmp_path}", "run_name=taken")
    assert "taken" in error and "--resume" in error


def test_too_few_cpus(monkeypatch, capsys, tmp_path: Path) -> None:
    error = attempt(monkeypatch, capsys, "train", "shapes", f"runs_dir={tmp_path}", "learner.cpus=64")
    assert "CPUs" in error and "learner" in error
    assert not (tmp_path / "shapes").exists()


def test_resume_of_what_is_not_a_run(monkeypatch, capsys, tmp_path: Path) -> None:
    assert str(tmp_path) in attempt(monkeypatch, capsys, "train", "--resume", str(tmp_path))


def test_resume_without_the_checkpoints_that_a_run_had(monkeypatch, capsys, tmp_path: Path) -> None:
    """It would begin again and forget what was measured."""
    run = RunDirectory(tmp_path / "mine").create(to_yaml(load_config("shapes", ["checkpoints.every=2"])))
    for step in range(5):
        run.append_metrics({"step": step})
    run.write_json(run.evaluation_file(4), {})
    error = attempt(monkeypatch, capsys, "train", "--resume", str(run.path), "checkpoints.every=50")
    assert "checkpoints holds no checkpoint although 5 steps are done; restore one" in error
    assert len(run.read_metrics()) == 5 and run.evaluation_file(4).exists()


def test_a_resume_that_fails_leaves_the_run_as_it_was(monkeypatch, capsys, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "mine").create(to_yaml(load_config("shapes")))
    before = run.config.read_bytes()
    assert "the actors ask for" in attempt(monkeypatch, capsys, "train", "--resume", str(run.path), "learner.cpus=640")
    assert run.config.read_bytes() == before


def checkpointed(directory: Path, config: TrainConfig) -> RunDirectory:
    """A run with a checkpoint that a resume looks at before anything starts."""
    run = RunDirectory(directory).create(to_yaml(config))
    with replacing_directory(run.checkpoint(20)) as aside:
        save_file({f"master.{name}": torch.zeros(1) for name in trained_names(config)}, aside / "optimizer.safetensors")
        state = {"step": 20, "reference": identity(directories(config.model))}
        (aside / "state.json").write_text(json.dumps(state))
        (aside / MANIFEST).write_text(json.dumps({}))
    return run


def test_resume_with_another_set_of_trained_parameters(monkeypatch, capsys, tmp_path: Path) -> None:
    """What is not trained any more would be the start's again."""
    config = load_config("shapes", ["optimizer.frozen=[denoising]", "objective.image_weight=0"])
    run = checkpointed(tmp_path / "mine", config)
    for override, said in (("[]", "is trained now and was not before"), ("[denoising, '*.layers.0.*']", "was trained")):
        error = attempt(monkeypatch, capsys, "train", "--resume", str(run.path), f"optimizer.frozen={override}")
        assert said in error and f"start a new run with model.path={run.checkpoint(20) / 'policy'}" in error


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "learner.lora.rank=8",
            "learner.lora.rank is 8 but the run's adapters were trained with 4; leave it as it was",
        ),
        ("learner.lora.alpha=320", "learner.lora.alpha is 320 but the run's adapters were trained with 32; leave it"),
        ("seed=5", "seed is 5 but was 0, from which the adapters were drawn that optimizer.frozen keeps; leave it"),
        ("learner.lora=null", "is trained now and was not before"),
    ],
)
def test_resume_with_adapters_that_mean_something_else(
    monkeypatch, capsys, tmp_path: Path, override: str, said: str
) -> None:
    config = load_config("shapes", ["learner.lora.rank=4", "optimizer.frozen=['*.lora_A.*']"])
    run = checkpointed(tmp_path / "mine", config)
    frozen = ["optimizer.frozen=[]"] if override == "learner.lora=null" else []
    assert said in attempt(monkeypatch, capsys, "train", "--resume", str(run.path), override, *frozen)


@pytest.mark.parametrize("name", ["my model", "2026", "ckpt #2", "a: b", "x" * 120])
def test_a_checkpoints_name_is_taken_as_it_is(monkeypatch, capsys, name: str) -> None:
    assert f"{name} does not exist" in attempt(monkeypatch, capsys, "eval", name)


def test_unknown_recipe_suggests_the_known_one(monkeypatch, capsys) -> None:
    assert "did you mean shapes" in attempt(monkeypatch, capsys, "train", "shaps")


def test_what_an_sft_left_that_did_not_come_to_its_end(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "mine-sft").mkdir()
    error = attempt(monkeypatch, capsys, "sft", "shapes-sft", f"out={tmp_path / 'mine'}")
    assert "mine-sft is left of an attempt to make" in error and "resume" not in error
