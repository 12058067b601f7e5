"""`unigrpo reproduce`: the page from synthetic cells, and one real cell at tiny size that is not run twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import ConfigError
from common.rundir import RunDirectory, dump_json
from deploy.reproduce import ROWS, TASKS, Cell, Plan, check_rows, finished, origin, run_cell, seeds_of, stages
from deploy.reproduction_page import read_cells, score, write_page


def _cell(row: str, seed: int, rate: float, steps: int = 30, prompts: int = 70) -> Cell:
    rng = np.random.default_rng([seed, int(100 * rate)])
    strict = rng.binomial(4, rate, prompts)
    return {
        "row": row,
        "seed": seed,
        "origin": {"steps": [steps]},
        "minutes": 7.0,
        "finished": "2026-01-02",
        "machine": "a machine, 2 CPUs",
        "result": {
            "tags": sorted((*TASKS, "reasoning")[p % 7] for p in range(prompts)),
            "images": [4] * prompts,
            "strict": strict.tolist(),
            "ta": (2 + strict / 2).tolist(),
            "ta_images": [4] * prompts,
        },
        "curves": {
            key: np.linspace(0.3, rate, steps).tolist()
            for key in ("reward/mean", "reward/shapes/strict", "reward/shapes/ta")
        },
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "page" / "cells").mkdir(parents=True)
    return tmp_path / "page"


def _store(out: Path, *cells: Cell) -> None:
    for cell in cells:
        (out / "cells" / f"{cell['row']}-seed{cell['seed']}.json").write_bytes(dump_json(cell))


def test_numbers_by_hand() -> None:
    first, second = _cell("unigrpo", 0, 0.5, prompts=3), _cell("unigrpo", 1, 0.5, prompts=3)
    for cell, strict, ta in ((first, [4, 2, 0], [4, 3, 1]), (second, [2, 0, 0], [3, 2, 1])):
        cell["result"].update(tags=["a", "a", "b"], strict=strict, ta=ta)
    found = score([first, second])
    assert found.tasks["a"].mean == pytest.approx(8 / 16)
    assert found.tasks["b"].mean == 0
    assert found.overall.mean == pytest.approx(0.25)
    assert found.ta.mean == pytest.approx(14 / 24)
    second["result"]["tags"] = ["a", "b", "b"]
    with pytest.raises(ValueError, match="different prompts"):
        score([first, second])


def test_intervals_cover_seeds_and_prompts() -> None:
    same = [_cell("unigrpo", seed, 0.5) for seed in (0, 0, 0)]
    apart = [_cell("unigrpo", 0, rate) for rate in (0.3, 0.5, 0.7)]
    narrow, wide = (score(cells).overall for cells in (same, apart))
    assert 0.03 < narrow.high - narrow.low < wide.high - wide.low
    assert narrow.low < narrow.mean < narrow.high


def test_page_holds_whatever_cells_there_are(out: Path) -> None:
    rates = {"sft-think": 0.4, "textgrpo": 0.6, "unigrpo": 0.85, "learned-none": 0.3}
    _store(out, *(_cell(row, seed, rate) for row, rate in rates.items() for seed in (1, 0)))
    page = write_page(out)
    assert page == out.with_suffix(".md")
    text = page.read_text()
    scores = {row: score(cells) for row, cells in read_cells(out).items()}
    assert list(scores) == list(rates)  # the order of ROWS
    assert f"| UniGRPO | {scores['unigrpo'].ta} | 83.8 | {scores['unigrpo'].overall} | 90 | 2 | 30 in 7 min |" in text
    assert "| Learned reward, no regulariser |" in text and "ReFL, thinking" not in text
    removed = 1 - (1 - scores["unigrpo"].overall.mean) / (1 - scores["sft-think"].overall.mean)
    assert f"removes {100 * removed:.0f} % of the strict error" in text
    assert "is TextGRPO" in text and "does not overlap" in text
    row = next(line for line in text.splitlines() if line.startswith("| TextGRPO") and "(" in line)
    assert row.split(" | ")[1] == f"{100 * scores['textgrpo'].tasks['single_object'].mean:.1f} (99)"
    assert "a machine, 2 CPUs: 8 cells, 56 minutes" in text
    for figure in ("curves", "regulariser"):
        assert f"({out.name}/{figure}.png)" in text
        with Image.open(out / f"{figure}.png") as picture:
            assert len(np.unique(np.asarray(picture))) > 10


def test_page_without_trained_cells_has_no_figures(out: Path) -> None:
    cell = _cell("sft", 0, 0.3)
    cell.update(origin={"steps": [0]}, minutes=0.0, curves={key: [] for key in cell["curves"]})
    _store(out, cell)
    text = write_page(out).read_text()
    assert "| 1 | evaluated only |" in text and "![" not in text


def test_every_row_resolves_and_later_stages_start_from_earlier_ones(tmp_path: Path) -> None:
    plan = Plan(tuple(ROWS), (0, 1, 2), 5, ("data.group_size=4",), tmp_path)
    for row in ROWS:
        configs = stages(plan, row, 1)
        assert all(c.data.group_size == 4 and c.seed == 1 and c.steps in (0, 5) and not c.max_minutes for c in configs)
        # The truth is in every row, so that all are measured alike.
        assert all("shapes" in {scorer.name for scorer in c.rewards} for c in configs)
        assert seeds_of(plan, row) == ((0, 1, 2) if configs[0].steps else (0,))
    first, second = stages(plan, "two-stage", 2)
    assert second.model.path == str(first.directory / "checkpoints" / "step-000005" / "policy")
    assert first.run_name != second.run_name
    with pytest.raises(ConfigError, match="unigrp is not known; choose from sft"):
        check_rows(["unigrp"])


def test_a_cell_of_another_plan_is_not_taken_for_this_one(out: Path) -> None:
    plan, cell = Plan(("unigrpo",), (0, 1), 30, (), out), _cell("unigrpo", 0, 0.5)
    cell["origin"] = origin(plan, "unigrpo", 0)
    _store(out, cell)
    assert finished(plan, "unigrpo", 0) == cell
    assert finished(plan, "unigrpo", 1) is None
    for steps, overrides, word in ((20, (), "steps"), (30, ("data.group_size=4",), "overrides")):
        with pytest.raises(ConfigError, match=f"was made with {word}"):
            finished(Plan(("unigrpo",), (0,), steps, overrides, out), "unigrpo", 0)
    for key in ("recipe", "start"):
        _store(out, cell | {"origin": cell["origin"] | {key: "another"}})
        with pytest.raises(ConfigError, match=f"was made with {key} another"):
            finished(plan, "unigrpo", 0)


def test_an_unfinished_run_of_other_settings_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIGRPO_HOME", str(tmp_path))
    plan = Plan(("sft",), (0,), None, (), tmp_path)
    (config,) = stages(plan, "sft", 0)
    RunDirectory(config.directory).create("steps: 1\n")
    with pytest.raises(ConfigError, match="is a run of other settings; remove it"):
        run_cell(plan, "sft", 0)


def test_one_cell_runs_once(tmp_path: Path) -> None:
    small = ["data.prompts_per_step=2", "data.group_size=4", "evaluation.prompts=7", "evaluation.images_per_prompt=2"]
    command = [
        *(sys.executable, "-c", "from deploy.cli import main; main()", "reproduce", *small),
        *("--rows", "flowgrpo", "--seeds", "0", "--steps", "1", "--out", "page"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path = tmp_path / "page" / "cells" / "flowgrpo-seed0.json"
    cell = json.loads(path.read_bytes())
    assert (cell["row"], cell["origin"]["steps"], len(cell["result"]["tags"])) == ("flowgrpo", [1], 7)
    assert cell["curves"]["reward/shapes/ta"][0] is not None
    assert str(tmp_path) not in path.read_text()
    before = path.stat().st_mtime_ns
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0 and path.stat().st_mtime_ns == before
    assert "FlowGRPO, no thinking" in (tmp_path / "page.md").read_text()
