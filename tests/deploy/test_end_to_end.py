"""The main job as a user starts it, with every real engine: Ray actors, vLLM, the SDE, the detector, DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from journals import read_events
from PIL import Image
from safetensors.numpy import load_file

from common.config import ConfigError, resolve_path
from common.metrics import METRICS, describe
from common.recipe import load_config
from common.records import read_groups
from common.rundir import RunDirectory
from deploy.control import scale
from deploy.grid import CELL
from deploy.report import write_report
from deploy.reproduction.cells import cell_file, read_cells
from deploy.reproduction.command import reproduce
from deploy.reproduction.rows import Plan, stages
from learner.checkpoint import newest_whole, verify

SMALL = [
    "rollout.dtype=float32",
    "learner.dtype=float32",
    "data.prompts_per_step=4",
    "data.group_size=4",
    "sampling.max_tokens=26",
    "rollout.groups_per_call=2",
    "evaluation.prompts=7",
    "evaluation.images_per_prompt=2",
    "evaluation.samples=7",
    "recording.rollouts_every=1",
    "recording.latents=true",
    "recording.timeline_every=2",
    "checkpoints.every=1",
]
# What must come out equal when a run is repeated or resumed; the rest are times.
DETERMINISTIC = [
    key for key in METRICS if not key.startswith(("time/", "rollout/")) and "<" not in key and key != "weights/sync_s"
]


UNIGRPO = str(Path(sys.executable).with_name("unigrpo"))


def command(runs: Path, name: str, *extra: str) -> list[str]:
    return [UNIGRPO, "train", "shapes", *SMALL, f"runs_dir={runs}", f"run_name={name}", *extra]


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(("unigrpo",), (0,), 3, tuple(SMALL), tmp_path_factory.mktemp("reproduction") / "page")


@pytest.fixture(scope="module")
def whole(plan: Plan) -> Iterator[RunDirectory]:
    """Three uninterrupted steps, on one replica in the end: the run of a cell of `unigrpo reproduce`."""
    asked = [*SMALL, "--rows", "unigrpo", "--seeds", "0", "--steps", "3", "--out", str(plan.out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIGRPO_HOME", str(plan.out.parent))
        whole = RunDirectory(stages(plan, "unigrpo", 0)[0].directory)
        process = subprocess.Popen(
            [UNIGRPO, "reproduce", *asked], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            while not whole.status.exists():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            assert sorted(scale(whole.path, 1)) == ["rollout-0", "rollout-1"]
            output = process.communicate(timeout=580)[0]
        finally:
            process.terminate()  # if it has not ended; it then ends its actors
            process.wait()
        assert process.returncode == 0, output[-6000:]
        table = whole.parameters.read_text()
        assert "  reasoning, learning rate 0.0001: " in table and table in output
        yield whole


def test_every_documented_metric_is_there(whole: RunDirectory) -> None:
    rows = whole.read_metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    documented = {key for key in METRICS if "<" not in key}
    assert not documented - rows[0].keys()
    assert all(row[key] is not None for row in rows for key in documented)
    assert not [key for key in rows[0] if describe(key) is None]


def test_a_live_run_is_scaled(whole: RunDirectory) -> None:
    assert whole.read_metrics()[-1]["rollout/replicas_wanted"] == 1
    with pytest.raises(ConfigError, match=r"no driver of .* answered"):
        scale(whole.path, 2, answer_s=0.5)


def test_the_first_update_is_exactly_on_policy(whole: RunDirectory) -> None:
    first = whole.read_metrics()[0]
    assert first["text/ratio_mean"] == 1.0
    assert first["image/ratio_mean"] == 1.0
    assert first["image/velocity_mse"] == 0.0
    assert first["text/clip_fraction"] == first["image/clip_fraction"] == 0.0


def test_two_engines_agree_after_every_sync(whole: RunDirectory) -> None:
    for row in whole.read_metrics():
        # vLLM's kernels are not the learner's: equal to rounding, and not the same numbers handed over.
        assert 0 < row["text/logprob_diff_rollout"] < 1e-5
        assert row["image/velocity_diff_rollout"] < 1e-5


def test_both_halves_are_trained_and_published(whole: RunDirectory) -> None:
    rows = whole.read_metrics()
    assert [row["weights/version"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm/reasoning"] > 0 and row["grad_norm/denoising"] > 0 for row in rows)
    assert rows[2]["image/velocity_mse"] > 0
    start, trained = resolve_path(load_config("shapes").model.path), whole.checkpoint(3) / "policy"
    before, after = (load_file(directory / "ema.safetensors") for directory in (start, trained))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert any("_moe_gen" in name for name in moved)
    assert any("_moe_gen" not in name and "self_attn" in name for name in moved)
    assert "latent_pos_embed.pos_embed" not in moved


def test_rollouts_are_recorded_with_the_version_they_were_made_with(whole: RunDirectory) -> None:
    window = load_config(str(whole.config)).sampling.window_size
    for step in range(3):
        groups = read_groups(whole.rollout_file(step))
        assert len(groups) == 4
        for group, rewards, advantages in groups:
            assert len(group.chains) == len(rewards) == 4
            assert abs(advantages.sum()) < 1e-3
            for chain in group.chains:
                assert chain.text.version == chain.image.version == step
                assert len(chain.text.ids) == len(chain.text.logprobs) > 0
                assert (chain.text.logprobs <= 0).all()
                assert chain.image.x_t.shape[0] == window
                assert chain.image.pixels.shape == (32, 32, 3)
        chains = [chain for group, *_ in groups for chain in group.chains]
        assert len({chain.seed for chain in chains}) == len(chains)
        row = whole.read_metrics()[step]
        assert row["text/tokens_mean"] == np.mean([len(chain.text.ids) for chain in chains])
        assert 0 < row["text/truncated"] == np.mean([not chain.text.finished for chain in chains])


def test_checkpoints_evaluations_and_report(whole: RunDirectory) -> None:
    assert verify(whole.checkpoint(3))["weights_version"] == 3
    results = whole.read_evaluations()
    assert list(results) == [0, 3]
    assert results[0]["n_prompts"] == 7 and results[0]["images_per_prompt"] == 2
    assert results[0]["version"] == 0 and results[3]["version"] == 3
    assert "data:image/png;base64" in write_report(whole).read_text()
    assert list(whole.tensorboard.iterdir())


def test_eval_finds_what_the_training_found_and_starts_no_learner(whole: RunDirectory, tmp_path: Path) -> None:
    # A learner for which there is no room, and one replica where the training had two.
    program, *rest = command(tmp_path, "unused", "learner.cpus=64", "rollout.replicas=1")
    overrides = [argument for argument in rest[2:] if not argument.startswith("run_name")]
    output = run([program, "eval", str(whole.checkpoint(3) / "policy"), *overrides])
    found, table, grid = (Path(line) for line in output.splitlines()[-3:])
    result = json.loads(found.read_bytes())
    trained = whole.read_evaluations()[3]
    assert result["protocol"].pop("model") == str(whole.checkpoint(3) / "policy")
    assert {**result, "step": 3, "version": 3} == trained
    assert f"| TA-like score | {100 * trained['ta']:.1f} % (" in table.read_text()
    with Image.open(grid) as picture:
        assert picture.format == "PNG" and picture.height > 7 * CELL


def test_a_finished_cell_is_not_run_again(whole: RunDirectory, plan: Plan) -> None:
    path, results = cell_file(plan, "unigrpo", 0), whole.read_evaluations()
    (cell,), text = read_cells(plan).cells["unigrpo"], path.read_text()
    assert sum(cell["result"]["strict"]) / sum(cell["result"]["images"]) == pytest.approx(results[3]["strict"])
    assert cell["curves"]["reward/mean"] == pytest.approx(
        [row["reward/mean"] for row in whole.read_metrics()], abs=1e-3
    )
    assert str(plan.out.parent) not in text
    page = reproduce(plan)
    assert path.read_text() == text and "| UniGRPO |" in page.read_text()


def test_events_tell_the_story_of_the_run(whole: RunDirectory) -> None:
    events = read_events(whole.events)
    kinds = [line["event"] for line in events]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended") and events[-1]["outcome"] == "done"
    assert [line["step"] for line in events if line["event"] == "step"] == [0, 1, 2]
    assert [line["path"] for line in events if line["event"] == "checkpoint"] == [
        str(whole.checkpoint(step)) for step in (1, 2, 3)
    ]
    assert [line["step"] for line in events if line["event"] == "evaluation"] == [0, 3]


def test_a_timeline_shows_what_every_actor_did(whole: RunDirectory) -> None:
    assert sorted(whole.timelines.iterdir()) == [whole.timeline_file(0), whole.timeline_file(2)]
    trace = json.loads(whole.timeline_file(2).read_text())["traceEvents"]
    names = {entry["tid"]: entry["args"]["name"] for entry in trace if entry["name"] == "thread_name"}
    did = {(names[entry["tid"]], entry["name"]) for entry in trace if entry["ph"] == "X"}
    assert {("driver", phase) for phase in ("rollout", "reward", "update", "sync")} <= did
    assert {(f"rollout-{i}", half) for i in range(2) for half in ("reasoning", "drawing")} & did
    assert {("reward-shapes-0", "score"), ("learner-0", "publish")} <= did
    assert {(f"learner-{i}", "update") for i in range(2)} <= did
    (update,) = [e["dur"] for e in trace if e["name"] == "update" and names[e["tid"]] == "driver"]
    assert abs(update / 1e6 - whole.read_metrics()[2]["time/update_s"]) < 0.1


def test_a_killed_run_resumes_as_if_it_had_not_stopped(whole: RunDirectory, tmp_path: Path) -> None:
    arguments = command(tmp_path, "killed", "steps=3", "rollout.replicas=1")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    killed = RunDirectory(tmp_path / "killed")
    deadline = time.monotonic() + 240
    while newest_whole(killed.checkpoints) is None:
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Fewer replicas change no number, and weights that were broadcast are those that each would have fetched.
    resume = [UNIGRPO, "train", "--resume", str(killed.path)]
    output = run([*resume, "rollout.transport=collective"])
    assert f"report: {killed.report}" in output and killed.report.exists()
    assert load_config(str(killed.config)).rollout.transport == "collective", "what it went on with"
    expected, got = whole.read_metrics(), killed.read_metrics()
    assert [row["step"] for row in got] == [0, 1, 2]
    for wanted, found in zip(expected, got, strict=True):
        for key in DETERMINISTIC:
            assert found[key] == wanted[key], (found["step"], key)
    a, b = (json.loads((r.evaluation_file(3)).read_text()) for r in (whole, killed))
    assert a == b
