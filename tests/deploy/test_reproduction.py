"""`unigrpo reproduce`: the page from synthetic cells, and what is run and what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import ConfigError
from common.rundir import RunDirectory, dump_json
from deploy.reproduction.cells import Cell, cell_file, minutes_left, missing, read_cells
from deploy.reproduction.command import ReproductionError, reproduce, run_cell
from deploy.reproduction.page import score, to_markdown, write_page
from deploy.reproduction.rows import (
    ROWS,
    STEPS,
    TASKS,
    Plan,
    check_out,
    check_overrides,
    check_rows,
    default_out,
    origin,
    stages,
)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tuple(ROWS), (0, 1), 30, (), tmp_path / "page")


def _cell(row: str, seed: int, rate: float, plan: Plan | None = None, prompts: int = 70, steps: int = 30) -> Cell:
    rng = np.random.default_rng([seed, int(100 * rate)])
    strict = rng.binomial(4, rate, prompts)
    return {
        "row": row,
        "seed": seed,
        "origin": origin(plan, row) if plan else {"steps": [steps]},
        "minutes": 7.0,
        "wall_minutes": 8.0,
        "finished": "2026-01-02",
        "machine": "a machine, 2 CPUs",
        "dtypes": ["bfloat16", "bfloat16"],
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


def _store(plan: Plan, *cells: Cell) -> None:
    (plan.out / "cells").mkdir(parents=True, exist_ok=True)
    for cell in cells:
        cell_file(plan, cell["row"], cell["seed"]).write_bytes(dump_json(cell))


def test_numbers_by_hand() -> None:
    first, second = _cell("unigrpo", 0, 0.5, prompts=3), _cell("unigrpo", 1, 0.5, prompts=3)
    for cell, strict, ta in ((first, [4, 2, 0], [4, 3, 1]), (second, [2, 0, 0], [3, 2, 1])):
        cell["result"].update(tags=["a", "a", "b"], strict=strict, ta=ta)
    found = score([first, second])
    assert found.tasks["a"].mean == pytest.approx(8 / 16)
    assert found.tasks["b"].mean == 0
    assert found.ta_tasks["a"].mean == pytest.approx(12 / 16) and found.ta_tasks["b"].mean == pytest.approx(2 / 8)
    assert found.overall.mean == pytest.approx(0.25)
    assert found.ta.mean == pytest.approx(14 / 24)
    second["result"]["tags"] = ["a", "b", "b"]
    with pytest.raises(ValueError, match="different prompts"):
        score([first, second])


def test_prompts_without_scored_images_count_nowhere() -> None:
    whole, lost = (_cell("unigrpo", seed, 0.5, prompts=4) for seed in (0, 1))
    for cell, images in ((whole, [4, 4, 4, 4]), (lost, [4, 0, 4, 4])):
        strict = [count and 2 for count in images]
        cell["result"].update(tags=["a", "a", "b", "b"], images=images, strict=strict, ta=strict, ta_images=images)
    found = score([whole, lost])
    assert found.tasks["a"].mean == found.overall.mean == found.ta.mean == pytest.approx(0.5)
    assert found.overall.low == found.overall.high == pytest.approx(0.5)


def test_intervals_cover_seeds_and_prompts() -> None:
    same = [_cell("unigrpo", seed, 0.5) for seed in (0, 0, 0)]
    apart = [_cell("unigrpo", 0, rate) for rate in (0.3, 0.5, 0.7)]
    narrow, wide = (score(cells).overall for cells in (same, apart))
    assert 0.03 < narrow.high - narrow.low < wide.high - wide.low
    assert narrow.low < narrow.mean < narrow.high


def test_page_holds_whatever_cells_there_are(plan: Plan) -> None:
    rates = {"sft-think": 0.4, "textgrpo": 0.6, "unigrpo": 0.85, "cfg": 0.8, "learned-none": 0.3}
    _store(plan, *(_cell(row, seed, rate, plan) for row, rate in rates.items() for seed in (1, 0)))
    cell_file(plan, "textgrpo", 1).unlink()
    _store(plan, _cell("cfg", 1, 0.8, plan) | {"dtypes": ["float32", "float32"]})
    page = write_page(plan, read_cells(plan))
    assert page == plan.out.with_suffix(".md")
    text = page.read_text()
    scores = {row: score(cells) for row, cells in read_cells(plan).cells.items()}
    assert list(scores) == list(rates)  # the order of ROWS
    assert f"| UniGRPO | {scores['unigrpo'].ta} | 83.8 | {scores['unigrpo'].overall} | 90 | 2 | 30 in 7 min |" in text
    assert "| ReFL, thinking | missing | 81.2 | missing | 84 | 0 | – |" in text
    gaps = next(line for line in text.splitlines() if line.startswith("- Missing: "))
    assert "TextGRPO (seeds 1);" in gaps and "SFT, no thinking (seeds 0);" in gaps and "UniGRPO (" not in gaps
    removed = 1 - (1 - scores["unigrpo"].overall.mean) / (1 - scores["sft-think"].overall.mean)
    assert f"removes {100 * removed:.0f} % of the strict error" in text
    assert "is TextGRPO" in text and "interval lies above it" in text
    assert f"- UniGRPO, CFG in training: {scores['cfg'].overall} instead of {scores['unigrpo'].overall}." in text
    assert (
        "accuracy: UniGRPO > UniGRPO, CFG in training > TextGRPO > SFT, thinking > Learned reward, no regulariser."
        in text
    )
    row = next(line for line in text.splitlines() if line.startswith("| TextGRPO") and "(" in line)
    assert row.split(" | ")[1] == f"{scores['textgrpo'].tasks['single_object']} (99)"
    # Where a machine computed otherwise, the page says so; it makes no cell stale.
    assert "a machine, 2 CPUs, bfloat16: 8 cells, 56 minutes" in text and "2 CPUs, float32: 1 cells, 7 min" in text
    assert "- Computed in float32 instead of bfloat16, as the machine does: UniGRPO, CFG in training (seeds 1)." in text
    # The budget of two stages, and which guidance a row is judged with.
    assert "- FlowGRPO, then TextGRPO: 30 + 30 = 60 steps in all." in text
    assert "- UniGRPO, CFG in training: trained and evaluated with text scale 2.\n" in text
    assert "- UniGRPO, CFG in evaluation alone: evaluated with text scale 2.\n- The other rows: without" in text
    assert "- Of one seed only, so that the interval is one over prompts: TextGRPO." in text
    assert text.count("| TextGRPO | ") == 3, "overall, strict by task, TA by task"
    assert "| Learned reward, no regulariser, seed 0 | 30.0 → 30.0 | 30.0 → 30.0 |" in text
    for figure in ("curves", "ablations", "regulariser"):
        assert f"({plan.out.name}/{figure}.png)" in text
        with Image.open(plan.out / f"{figure}.png") as picture:
            assert len(np.unique(np.asarray(picture))) > 10


def test_page_says_which_shared_stages_were_trained_anew_and_what_became_of_the_reward(plan: Plan) -> None:
    """Reward and truth of the learned rows: up and up, up and down, down and down, by seed."""
    for row in ("sft", "sft-think", "unigrpo", "cfg-evaluation", *(row for row in ROWS if row.startswith("learned"))):
        for seed in (0, 1, 2):
            made = _cell(row, seed, 0.5, plan)
            up, down = np.linspace(0.2, 0.8, 30).tolist(), np.linspace(0.8, 0.2, 30).tolist()
            if row.startswith("learned"):
                made["curves"]["reward/mean"] = up if seed < 2 else down
                made["curves"]["reward/shapes/strict"] = up if seed < 1 else down
            elif row == "cfg-evaluation" and seed == 1:
                made["curves"]["reward/mean"] = down
            _store(plan, made)
    page = write_page(plan, read_cells(plan)).read_text()
    assert "trained once, but anew for UniGRPO, CFG in evaluation alone (seed 1).\n" in page
    assert (
        "Learned reward, latent KL: of 3 seeds, reward and truth rose in 1, the reward rose while the truth fell (the "
        "scorer was fooled) in 1, and both fell (the policy broke down) in 1."
    ) in page


def test_page_without_trained_cells_has_no_figures(plan: Plan) -> None:
    cell = _cell("sft", 0, 0.3, plan)
    cell.update(minutes=0.0, curves={key: [] for key in cell["curves"]})
    _store(plan, cell)
    text = write_page(plan, read_cells(plan)).read_text()
    assert "| 1 | evaluated only |" in text and "![" not in text


def test_every_row_resolves_and_later_stages_start_from_earlier_ones(tmp_path: Path) -> None:
    plan = Plan(tuple(ROWS), (0, 1, 2), 5, ("data.group_size=4",), tmp_path)
    for row in ROWS:
        configs = stages(plan, row, 1)
        assert all(c.data.group_size == 4 and c.seed == 1 and c.steps in (0, 5) and not c.max_minutes for c in configs)
        # The truth is in every row, so that all are measured alike.
        assert all("shapes" in {scorer.name for scorer in c.rewards} for c in configs)
        asked = [seed for name, seed in missing(plan, read_cells(plan)) if name == row]
        assert asked == ([0, 1, 2] if configs[0].steps else [0])
    first, second = stages(plan, "two-stage", 2)
    assert second.model.path == str(first.directory / "checkpoints" / "step-000005" / "policy")
    for overrides in (("model.path=tests/golden/ckpt",), ("model={path: tests/golden/ckpt}",)):
        first, second = stages(replace(plan, overrides=overrides), "two-stage", 2)
        assert first.model.path == "tests/golden/ckpt" and second.model.path.startswith(str(first.directory))
    first, second = stages(plan, "two-stage", 2)
    assert first.run_name != second.run_name and [first] == stages(plan, "flowgrpo-think", 2)  # trained once
    trained, guided = stages(plan, "cfg-evaluation", 2)
    assert [trained] == stages(plan, "unigrpo", 2) and guided.steps == 0
    assert guided.evaluation.cfg == stages(plan, "cfg", 2)[0].evaluation.cfg
    with pytest.raises(ConfigError, match="unigrp is not known; choose from sft"):
        check_rows(["unigrp"])


@pytest.mark.parametrize(("asked", "steps"), [(240, 140), (20, 20)])
def test_a_row_may_need_fewer_steps_than_are_asked_for(plan: Plan, asked: int, steps: int) -> None:
    plan = replace(plan, steps=asked)
    assert ROWS["learned-none"].most_steps == 140
    assert [config.steps for config in stages(plan, "learned-none", 0)] == [steps]
    assert [config.steps for config in stages(plan, "unigrpo", 0)] == [asked]
    assert [config.steps for config in stages(plan, "sft", 0)] == [0]


def test_the_regularisers_rows_differ_in_the_regulariser_alone(plan: Plan) -> None:
    told = [stages(plan, row, 0)[0].model_dump() for row in ROWS if row.startswith("learned-")]
    for config in told:
        config.pop("run_name"), config.pop("runs_dir")
        config["objective"].pop("regulariser"), config["objective"].pop("regulariser_weight")
    assert len(told) == 3 and told[0] == told[1] == told[2]


def test_a_stale_cell_is_named_not_counted_and_run_again(plan: Plan) -> None:
    good, other = _cell("unigrpo", 0, 0.5, plan), _cell("unigrpo", 1, 0.1, plan)
    plan = replace(plan, rows=("unigrpo",))
    for key in ("steps", "recipe", "start", "data"):
        _store(plan, good, other | {"origin": other["origin"] | {key: "another"}})
        stored = read_cells(plan)
        assert stored.stale == {("unigrpo", 1): key}
        assert stored.cells == {"unigrpo": [good]}
        assert missing(plan, stored) == [("unigrpo", 1)]
        assert f"not counted: unigrpo seed 1 (another {key})." in to_markdown(plan, stored, [])
    # Other steps and other settings make all of them stale; how many actors there are does not.
    _store(plan, good, other)
    for changes, stale in (
        ({"steps": 20}, "steps"),
        ({"overrides": ("data.group_size=4",)}, "recipe"),
        ({"overrides": ("model.path=tests/golden/ckpt",)}, "start"),
        # A compute type that is asked for is a setting; without that it is the machine's.
        ({"overrides": ("learner.dtype=bfloat16",)}, "recipe"),
    ):
        assert set(read_cells(replace(plan, **changes)).stale.values()) == {stale}
        assert stages(replace(plan, **changes), "unigrpo", 0)[0].runs_dir != stages(plan, "unigrpo", 0)[0].runs_dir
    fewer = (
        "rollout.replicas=1",
        "learner.ranks=1",
        'rewards=[{"name": "shapes", "replicas": 1}]',
    )
    assert read_cells(replace(plan, overrides=fewer)).stale == {}


def test_overrides_that_contradict_a_row_stop_it_alone(plan: Plan) -> None:
    """The page is written of the rows that were asked for; a cell of the other row is stale, not an error."""
    _store(plan, _cell("unigrpo", 0, 0.5, plan), _cell("cfg", 0, 0.5, plan))
    other = replace(plan, rows=("unigrpo",), seeds=(0,), overrides=("evaluation.cfg.text_scale=4",))
    stored = read_cells(other)
    assert stored.stale == {("unigrpo", 0): "recipe", ("cfg", 0): "recipe"}
    assert missing(other, stored) == [("unigrpo", 0)]
    cell = _cell("unigrpo", 0, 0.5, other)
    _store(other, cell)
    text = to_markdown(other, read_cells(other), [])
    assert "guidance" not in to_markdown(
        replace(plan, rows=("two-stage",)), read_cells(replace(plan, out=plan.out / "none")), []
    )
    assert f"{score([cell]).overall}" in text and "- UniGRPO: evaluated with text scale 4.\n" in text
    assert "without guidance" not in text
    with pytest.raises(ConfigError, match=r"sampling.cfg.text_scale is 2.0 but evaluation.cfg.text_scale is 4.0"):
        reproduce(replace(other, rows=("unigrpo", "cfg")))


@pytest.mark.parametrize("override", ["steps=20", "seed=3", "run_name=mine", "runs_dir=/tmp/x", "max_minutes=5"])
def test_what_cells_have_of_their_own_is_no_override(override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override}: cells have .* use --"):
        check_overrides(["data.group_size=4", override])


@pytest.mark.parametrize("name", ["page", "page.1", "page.2"])
def test_the_page_lies_beside_its_directory(plan: Plan, tmp_path: Path, name: str) -> None:
    plan = replace(plan, out=check_out(tmp_path / name))
    assert write_page(plan, read_cells(plan)) == tmp_path / f"{name}.md"
    plan = replace(plan, steps=STEPS, overrides=("rewards=[{name: shapes}]",))
    assert plan.command == f"unigrpo reproduce 'rewards=[{{name: shapes}}]' --out {tmp_path / name}"
    with pytest.raises(ConfigError, match="--out is /; give a directory with a name"):
        check_out(Path("/"))


def test_what_is_no_cell_is_named(plan: Plan) -> None:
    good = _cell("unigrpo", 0, 0.5, plan)
    file = cell_file(plan, "unigrpo", 0)
    for cell, problem in (
        ({key: value for key, value in good.items() if key != "curves"}, "curves: Field required"),
        (good | {"origin": None}, "origin: Input should be"),
        (good | {"result": good["result"] | {"tags": None}}, r"result\.tags: "),
        (good | {"result": good["result"] | {"ta": [1.0]}}, "result: .*its columns differ in length"),
        (good | {"curves": {}}, r".*its curves lack reward/mean, reward/shapes/strict"),
    ):
        _store(plan, cell)
        with pytest.raises(ConfigError, match=rf"{file.name} is not a cell \({problem}.*remove it"):
            read_cells(plan)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"is not a cell .*remove it"):
        read_cells(plan)
    _store(plan, good)
    file.with_name("copy.json").write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"copy\.json holds the cell unigrpo seed 0; remove it"):
        read_cells(plan)


def test_the_committed_cells_are_those_of_the_command_without_options() -> None:
    """Whatever this machine computes in; otherwise a call as the README has it would make them all again."""
    plan = Plan(tuple(ROWS), (0, 1, 2), STEPS, (), default_out())
    stored = read_cells(plan)
    assert stored.stale == {} and stored.has("unigrpo", 0) and plan.command == "unigrpo reproduce"


def test_time_left_goes_by_row_or_by_steps(plan: Plan) -> None:
    left = [("unigrpo", 1), ("two-stage", 0)]
    assert minutes_left(plan, read_cells(plan), left) is None
    _store(plan, _cell("unigrpo", 0, 0.5, plan), _cell("sft", 0, 0.5, plan) | {"wall_minutes": 1.0})
    assert minutes_left(plan, read_cells(plan), left) == pytest.approx(8 + 2 * 8)
    assert minutes_left(plan, read_cells(plan), [("sft", 0), ("sft-think", 0)]) == pytest.approx(1 + 0)


def test_a_cell_that_fails_costs_no_other(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, said = replace(plan, rows=("textgrpo", "unigrpo"), seeds=(0,)), []

    def run(plan: Plan, row: str, seed: int) -> Cell:
        if row == "textgrpo":
            raise RuntimeError("no room")
        return _cell(row, seed, 0.5, plan)

    monkeypatch.setattr("deploy.reproduction.command.run_cell", run)
    with pytest.raises(ReproductionError, match=r"1 cells failed; .* textgrpo seed 0: RuntimeError: no room"):
        reproduce(plan, said.append)
    assert list(read_cells(plan).cells) == ["unigrpo"]
    assert said[0] == "cell 1 of 2: textgrpo seed 0; an unknown time left"
    assert plan.out.with_suffix(".md").exists()


def test_an_unfinished_run_of_other_settings_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIGRPO_HOME", str(tmp_path))
    plan = Plan(("sft",), (0,), STEPS, (), tmp_path)
    (config,) = stages(plan, "sft", 0)
    RunDirectory(config.directory).create("steps: 1\n")  # by hand: a directory is named after what is run in it
    with pytest.raises(ConfigError, match="is a run of other settings; remove it"):
        run_cell(plan, "sft", 0)
