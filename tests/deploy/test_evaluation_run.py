"""What becomes of an evaluation that cannot be written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.recipe import load_config
from common.rundir import RunDirectory
from common.types import Prompt
from deploy import evaluation_run
from rewards.pool import Scored

PROMPTS = [
    Prompt("a", "a circle", {"tag": "t"}),
    Prompt("b", "a square", {"tag": "t"}),
    Prompt("c", "a circle", {"tag": "t"}),
]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two images of each prompt, all right."""
    right = np.ones((len(PROMPTS), 2), np.float32)
    scored = Scored(right.astype(np.float64), {}, {"shapes/strict": right}, 0, 0, 0.0)
    about = [[{"reasoning": "r", "reasoning_correct": None, "png": b"p"}] * 2] * len(PROMPTS)
    monkeypatch.setattr(evaluation_run, "redoing_lost", lambda session, batch, read: (scored, about))
    asked: list[bool] = []
    return SimpleNamespace(
        config=load_config("shapes"),
        run=RunDirectory(tmp_path / "run"),
        heldout=PROMPTS,
        version=3,
        progress=SimpleNamespace(phase=lambda text: None),
        rollout=SimpleNamespace(submit=lambda requests, first: asked.append(first)),
        show=lambda step, samples: None,
        asked=asked,
    )


def test_the_result_is_written_after_its_pictures(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an evaluation cut off between them is made again, not taken for whole."""

    def cut_off(path: Path, samples: Any) -> None:
        raise InterruptedError("killed")

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(evaluation_run, "write_samples", cut_off)
        evaluation_run.evaluate(session, step=4)
    assert not session.run.evaluation_file(4).exists()
    result = evaluation_run.evaluate(session, step=4)
    assert result["strict"] == 1
    assert result["protocol"] == {
        "heldout": "common/shapes/data/heldout.jsonl",
        "points": 21,
        "shift": 3.0,
        "think": True,
        "seed": 1234,
        "cfg.text_scale": 1.0,
    }
    assert session.run.evaluation_file(4).exists() and session.asked == [True, True]


def test_a_prompt_that_a_file_has_twice_is_one_with_more_images(session: Any) -> None:
    result = evaluation_run.evaluate(session, step=0)
    assert (result["n_prompts"], result["n_images"]) == (2, 6)
    samples = evaluation_run.read_samples(session.run.samples_file(0))
    assert sorted((s.prompt, s.chain) for s in samples) == [("a circle", k) for k in range(4)] + [
        ("a square", k) for k in range(2)
    ]


def test_a_full_disk_costs_an_evaluation_amid_the_run_only(session: Any, caplog: pytest.LogCaptureFixture) -> None:
    session.run.evaluations.parent.mkdir(parents=True)
    session.run.evaluations.write_text("in the way")
    assert evaluation_run.evaluate(session, step=4, required=False)["strict"] == 1
    assert "the evaluation at step 4 could not be written" in caplog.text
    with pytest.raises(OSError, match="eval"):
        evaluation_run.evaluate(session, step=4)
