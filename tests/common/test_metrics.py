"""Every tracker gets every finite number, and a resumed run repeats no step."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.config import ConfigError, TrainConfig
from common.metrics import METRICS, Trackers, describe, gauge
from common.records import encode_png
from common.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "demo").create("")


def _config(*trackers: str) -> TrainConfig:
    return TrainConfig.model_validate({"recording": {"trackers": trackers}})


def _tensorboard(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_metrics_jsonl_and_tensorboard_agree(run: RunDirectory) -> None:
    trackers = Trackers(_config("tensorboard"), run)
    trackers.log(0, {"reward/mean": np.float32(0.25), "text/entropy": float("nan")})
    trackers.log(1, {"reward/mean": 0.5, "text/entropy": None, "loss/nonfinite": 1})
    trackers.close()
    assert run.read_metrics() == [
        {"step": 0, "reward/mean": 0.25, "text/entropy": None},
        {"step": 1, "reward/mean": 0.5, "text/entropy": None, "loss/nonfinite": 1},
    ]
    assert _tensorboard(run) == {"reward/mean": [(0, 0.25), (1, 0.5)], "loss/nonfinite": [(1, 1.0)]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the writer that failed
def test_a_full_disk_costs_tensorboard_the_steps_that_it_lasts(run: RunDirectory) -> None:
    trackers = Trackers(_config("tensorboard"), run)
    trackers.log(0, {"reward/mean": 0.0})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, unlimited[1]))
        for step in (1, 2):
            trackers.log(step, {"reward/mean": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    trackers.log(3, {"reward/mean": 3.0})
    trackers.close()
    assert _tensorboard(run) == {"reward/mean": [(0, 0.0), (3, 3.0)]}


def test_resume_purges_what_will_be_logged_again(run: RunDirectory) -> None:
    first = Trackers(_config("tensorboard"), run)
    for step in range(4):
        first.log(step, {"reward/mean": step / 8})
    first.close()
    second = Trackers(_config("tensorboard"), run, resume_step=2)
    second.log(2, {"reward/mean": 0.75})
    second.close()
    assert [(row["step"], row["reward/mean"]) for row in run.read_metrics()] == [(0, 0), (1, 0.125), (2, 0.75)]
    assert _tensorboard(run) == {"reward/mean": [(0, 0.0), (1, 0.125), (2, 0.75)]}


def test_missing_wandb_is_a_config_error(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"recording.trackers names wandb, which is not installed; run `uv pip"):
        Trackers(_config("wandb"), run)


def test_wandb_continues_the_stored_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    def init(**settings: Any) -> SimpleNamespace:
        started.append(settings)
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for resume in (None, 1):
        trackers = Trackers(_config("wandb"), run, resume_step=resume)
        trackers.log(resume or 0, {"reward/mean": 0.5, "text/entropy": float("inf")})
        trackers.close()
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["name"] == "demo"
    assert started[0]["config"]["steps"] == 100
    assert logged == [{"step": 0, "reward/mean": 0.5}, {"step": 1, "reward/mean": 0.5}]


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What is set on Ray's gauges, in place of a Ray that would have to run."""
    calls: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description in METRICS.values()
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.tag_keys
            calls.append((self.name, value, tags))

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "ray.util.metrics", SimpleNamespace(Gauge=Gauge))
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace())
    return calls


def test_ray_gauges_are_set_with_the_run_as_tag(run: RunDirectory, gauges: list[Any]) -> None:
    Trackers(_config(), run).log(3, {"reward/mean": 0.5, "reward/a:B": 2.0, "text/entropy": float("nan")})
    assert gauges == [
        ("unigrpo_step", 3.0, {"run": "demo"}),
        ("unigrpo_reward_mean", 0.5, {"run": "demo"}),
        ("unigrpo_reward_of_scorer", 2.0, {"run": "demo", "scorer": "a:B"}),
    ]


def test_queues_are_sent_to_ray_between_steps(run: RunDirectory, gauges: list[Any]) -> None:
    read = threading.Event()

    def queue() -> dict[str, float]:
        read.set()
        return {"reward/queued_groups": 7.0}

    trackers = Trackers(_config(), run)
    trackers.watch(queue, every_s=0.01)
    assert read.wait(30)
    trackers.close()
    assert ("unigrpo_reward_queued_groups", 7.0, {"run": "demo"}) in gauges
    assert run.read_metrics() == []


def test_images_are_shown_in_tensorboard(run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(_config("tensorboard"), run)
    png = encode_png(np.zeros((3, 5, 3), np.uint8))
    trackers.images(4, {"heldout/three rings": png})
    trackers.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    (image,) = events.Images("heldout/three rings")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (4, 5, 3, png)


def test_gauge_names_are_valid_for_prometheus_and_distinct() -> None:
    names = {gauge(key.replace("<scorer>", "any"))[0] for key in METRICS}
    assert all(re.fullmatch(r"unigrpo_[a-z0-9_]+", name) for name in names)
    assert len(names) == len(METRICS)
    assert gauge("reward/mean") == ("unigrpo_reward_mean", {})


def test_scorers_are_described_and_typos_are_not() -> None:
    assert describe("reward/mean") == METRICS["reward/mean"]
    assert describe("reward/clip_score") == METRICS["reward/<scorer>"]
    assert describe("reward/shapes/strict") == METRICS["reward/<scorer>"]
    assert describe("text/entrpy") is None


def test_recording_and_reporting_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys, common.metrics, common.rundir, common.records, deploy.evaluation, deploy.report, deploy.progress\n"
        "import tensorboard.summary.writer.event_file_writer\n"
        "sys.exit(', '.join({'torch', 'ray', 'wandb', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
