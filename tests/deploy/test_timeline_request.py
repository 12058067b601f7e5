"""`unigrpo timeline` asks a live run through its directory."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.config import ConfigError, TrainConfig
from common.rundir import RunDirectory
from common.timeline import Span, span, take_spans
from deploy import timeline


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "demo").create("")


def finish(run: RunDirectory, step: int, every: int = 0) -> None:
    """What the driver does at the end of a step; the ranks are played."""
    config = TrainConfig.model_validate({"recording": {"timeline_every": every}})
    learner = SimpleNamespace(spans=lambda: [Span("learner-0", "update", 2.0, 1.0)])
    timeline.step_done(SimpleNamespace(config=config, run=run, learner=learner), step)  # type: ignore[arg-type]


def test_a_request_is_answered_with_the_step_that_ends_next(run: RunDirectory) -> None:
    take_spans()
    span("driver", "rollout", 0.0, 1.0)
    finish(run, 0)
    assert not run.timelines.exists()
    answer: list[Path] = []
    asking = threading.Thread(target=lambda: answer.append(timeline.ask(run.path, 60)))
    asking.start()
    while not run.timeline_request.exists():
        assert asking.is_alive()
    span("driver", "rollout", 1.0, 1.0)
    finish(run, 1)
    asking.join()
    assert answer == [run.timeline_file(1)]
    done = [e["name"] for e in json.loads(answer[0].read_text())["traceEvents"] if e["ph"] == "X"]
    assert done == ["rollout", "update"]
    finish(run, 2)
    assert [path.name for path in run.timelines.iterdir()] == ["step-000001.json"]


def test_timelines_are_written_every_so_many_steps(run: RunDirectory) -> None:
    for step in range(5):
        finish(run, step, every=2)
    assert sorted(path.name for path in run.timelines.iterdir()) == [f"step-00000{step}.json" for step in (0, 2, 4)]


def test_nobody_answers(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match=r"no step of .*demo ended within 0 s; the request stays"):
        timeline.ask(run.path, 0)
    finish(run, 7)
    assert run.timeline_file(7).exists()
