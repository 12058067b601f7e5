"""The chaos command, really killing; and that its checks would see damage."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.config import TrainConfig, resolve_path
from common.prompts import PromptOrder, read_prompts
from common.recipe import load_config
from common.records import write_groups
from common.rundir import RunDirectory
from common.types import Chain, Group, ImageSegment, TextSegment
from deploy.chaos.check import AUDIT, check_run
from deploy.chaos.command import KINDS, schedule
from deploy.requests import training_requests

STEPS = 3
SMALL = ["data.prompts_per_step=4", "data.group_size=4", "rollout.groups_per_call=1", "evaluation.prompts=1"]


@pytest.mark.timeout(900)
def test_a_run_survives_a_kill_of_every_actor_and_of_a_node(tmp_path: Path) -> None:
    """The driver's turn is in test_end_to_end.py."""
    command = [str(Path(sys.executable).with_name("unigrpo")), "chaos", "shapes", *SMALL, f"runs_dir={tmp_path}"]
    command += ["max_staleness=1"]  # so that groups are in flight when the learner dies
    done = subprocess.run([*command, "--kills", "4", "--seed", "8"], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "4 kills in" in done.stdout and "7 steps, 1 drivers, 0 problems" in done.stdout
    assert all(f"{kind} killed" in done.stdout for kind in KINDS if kind != "driver")


def test_every_kind_has_its_turn_and_the_seed_decides() -> None:
    storm = schedule(60, np.random.default_rng(0))
    assert len(storm) == 60 and set(storm[:5]) == set(KINDS)
    assert storm == schedule(60, np.random.default_rng(0)) != schedule(60, np.random.default_rng(1))
    assert len(schedule(3, np.random.default_rng(0))) == 3


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return load_config("shapes", [*SMALL, f"steps={STEPS}", f"runs_dir={tmp_path}", "run_name=calm"])


@pytest.fixture
def run(config: TrainConfig) -> RunDirectory:
    """What a run leaves that nothing happened to; its images are of one pixel."""
    run = RunDirectory(config.directory).create("")
    for step in range(STEPS):
        run.append_metrics(row(step))
        write_step(run, config, step)
    checkpoint = run.checkpoint(STEPS)
    checkpoint.mkdir(parents=True)
    state = json.dumps({"step": STEPS}).encode()
    (checkpoint / "state.json").write_bytes(state)
    (checkpoint / "manifest.json").write_text(json.dumps({"state.json": hashlib.sha256(state).hexdigest()}))
    run.write_json(AUDIT, {"learner": "a", "replicas": {"rollout-0": "a", "rollout-1": "a"}})
    return run


def row(step: int, **changed: float) -> dict[str, float]:
    return {
        "step": step,
        "weights/version": step + 1,
        "reward/masked_chains": 0,
        "rollout/stale_groups": 0,
    } | changed


def write_step(run: RunDirectory, config: TrainConfig, step: int, version: int | None = None, of: int = -1) -> None:
    """Groups as `step` asks for them (or as step `of` does), made by a version."""
    order = PromptOrder(read_prompts(resolve_path(config.data.train)), config.data.prompts_per_step, config.seed)
    version, none = step if version is None else version, np.zeros((0, 1, 1), np.float32)
    text = TextSegment(np.array([1]), np.array([2]), np.zeros(1, np.float32), True, "", version)
    pixel = np.zeros((1, 1, 3), np.uint8)
    image = ImageSegment(none, none, none, none[:, 0, 0], none[:, 0, 0], pixel, (1, 1), version)
    groups = [
        Group(request.prompt, step, tuple(Chain((text, image), seed) for seed in request.seeds))
        for request in training_requests(config, order, step if of < 0 else of)
    ]
    zeros = np.zeros((len(groups), config.data.group_size))
    write_groups(run.rollout_file(step), groups, zeros, {}, zeros, latents=False)


def test_a_calm_run_has_no_problems(run: RunDirectory, config: TrainConfig) -> None:
    assert check_run(run, config) == []


Damage = Callable[[RunDirectory, TrainConfig], object]
DAMAGE: dict[str, tuple[Damage, str]] = {
    "a step logged twice": (lambda run, _: run.append_metrics(row(STEPS - 1)), "not 0 to 2 once each"),
    "a step missing": (lambda run, _: run.rewind(STEPS - 1), "not 0 to 2 once each"),
    "an update doubled": (
        lambda run, _: (
            run.rewind(STEPS - 1),
            run.append_metrics(row(STEPS - 1, **{"weights/version": STEPS + 1})),
        ),
        "missing or doubled",
    ),
    "a chain masked": (
        lambda run, _: (run.rewind(2), run.append_metrics(row(2, **{"reward/masked_chains": 1}))),
        "left groups out",
    ),
    "groups trained twice": (lambda run, config: write_step(run, config, 2, of=1), "other groups than its own"),
    "groups from later weights": (lambda run, config: write_step(run, config, 1, version=2), r"versions \[2\]"),
    "groups too stale": (lambda run, config: write_step(run, config, 1, version=0), r"versions \[0\]"),
    "a record missing": (lambda run, _: run.rollout_file(1).unlink(), "is missing"),
    "a damaged checkpoint": (
        lambda run, _: (run.checkpoint(STEPS) / "state.json").write_text("{}"),
        "no whole checkpoint of the last step",
    ),
    "a replica with other weights": (
        lambda run, _: run.write_json(AUDIT, {"learner": "a", "replicas": {"rollout-0": "a", "rollout-1": "b"}}),
        "rollout-1 holds other weights",
    ),
    "a replica lost": (
        lambda run, _: run.write_json(AUDIT, {"learner": "a", "replicas": {"rollout-0": "a"}}),
        "only 1 replicas",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen(run: RunDirectory, config: TrainConfig, damage: str) -> None:
    make, said = DAMAGE[damage]
    make(run, config)
    (problem,) = check_run(run, config)
    assert re.search(said, problem)
