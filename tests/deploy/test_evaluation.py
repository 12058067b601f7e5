"""Held-out numbers, checked by hand and against a slow bootstrap."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from common.records import encode_png
from common.rundir import dump_json
from deploy.evaluation import PERCENT, Sample, compare, summarise, table, to_markdown
from deploy.grid import CELL, GAP, sample_grid


def _sample(tag: str, prompt: str, strict: float, reasoning: bool | None = None, partial: float = 0.5) -> Sample:
    return Sample(tag, prompt, "<think> plan: . </think>", strict, partial, reasoning)


ROWS = [
    _sample("color", "a", 1, True),
    _sample("color", "a", 0, True),
    _sample("color", "b", 1, False),
    _sample("color", "b", 1, True),
    _sample("count", "c", 0, False, partial=0.25),
    _sample("count", "c", 0, False, partial=0.25),
]


def _random(seed: int, rate: float, prompts: int = 60) -> list[Sample]:
    rng = np.random.default_rng(seed)
    ease = np.clip(rng.normal(rate, 0.3, prompts), 0, 1)
    return [
        _sample(("color", "count")[p % 2], f"p{p}", float(rng.random() < ease[p]), bool(rng.random() < rate))
        for p in range(prompts)
        for _ in range(4)
    ]


def test_numbers_by_hand() -> None:
    result = summarise(ROWS, version=7, step=3)
    assert (result["step"], result["version"], result["n_prompts"], result["images_per_prompt"]) == (3, 7, 3, 2)
    assert (result["n_images"], result["unscored"]) == (6, 0)
    assert result["strict"] == pytest.approx(3 / 6)
    assert result["by_tag"] == {
        "color": {"strict": 0.75, "ta": None, "n_prompts": 2, "n_images": 4},
        "count": {"strict": 0.0, "ta": None, "n_prompts": 1, "n_images": 2},
    }
    assert result["task_mean"] == pytest.approx(0.375)
    assert result["partial"] == pytest.approx((4 * 0.5 + 2 * 0.25) / 6)
    assert result["reasoning_accuracy"] == pytest.approx(3 / 6)
    assert result["image_given_reasoning"] == pytest.approx(2 / 3)


def test_the_order_of_rows_does_not_matter_and_the_result_is_json() -> None:
    result = summarise(ROWS, version=0)
    assert summarise(ROWS[::-1], version=0) == result
    assert json.loads(dump_json(result)) == result


def test_without_right_or_judged_reasoning_the_numbers_are_none() -> None:
    wrong = summarise([_sample("color", "a", 1, False)], version=0)
    assert (wrong["reasoning_accuracy"], wrong["image_given_reasoning"]) == (0.0, None)
    unjudged = summarise([_sample("color", "a", 1)], version=0)
    assert (unjudged["reasoning_accuracy"], unjudged["image_given_reasoning"]) == (None, None)
    assert [row[0] for row in table(unjudged)] == [
        "Strict accuracy",
        "Mean of task accuracies",
        "Partial score",
        "color",
    ]


def test_unscored_images_are_counted_and_left_out() -> None:
    result = summarise([*ROWS, _sample("count", "c", math.nan, True, math.nan)], version=0)
    assert (result["unscored"], result["n_images"], result["images_per_prompt"]) == (1, 6, 2)
    assert result["strict"] == pytest.approx(0.5)
    assert result["reasoning_accuracy"] == pytest.approx(0.5)
    # A prompt none of whose images was scored keeps its place among the prompts, and counts nowhere.
    lost = [_sample("color", "d", math.nan, True, math.nan), _sample("lost", "e", math.nan, None, math.nan)]
    result, whole = summarise([*ROWS, *lost], version=0), summarise(ROWS, version=0)
    assert [prompt["images"] for prompt in result["prompts"]] == [2, 2, 0, 2, 0]
    assert result["by_tag"]["lost"] == {"strict": None, "ta": None, "n_prompts": 1, "n_images": 0}
    for key in ("strict", "task_mean", "partial", "reasoning_accuracy", "image_given_reasoning", "n_images"):
        assert result[key] == whole[key]
    assert compare(result, whole)["n_prompts"] == 3
    assert ("lost", "–") in [row[:2] for row in table(result)]
    with pytest.raises(ValueError, match="none of the 1 evaluated images was scored"):
        summarise([_sample("count", "c", math.nan)], version=0)


def test_interval_is_the_bootstrap_over_prompts() -> None:
    rows = _random(0, 0.5)
    result = summarise(rows, version=0)
    by_prompt = np.array([row.strict for row in rows]).reshape(60, 4)
    rng = np.random.default_rng(99)
    slow = [by_prompt[rng.integers(60, size=60)].mean() for _ in range(4000)]
    np.testing.assert_allclose(result["strict_interval"], np.percentile(slow, [2.5, 97.5]), atol=0.012)
    # Resampling images would give a clearly narrower one.
    low, high = result["strict_interval"]
    assert high - low > 1.2 * 2 * 1.96 * np.sqrt(0.25 / 240)
    assert summarise(rows, version=0)["strict_interval"] == result["strict_interval"]


def test_a_certain_result_has_an_interval_without_width() -> None:
    assert summarise([_sample("t", p, 1) for p in "abc"], version=0)["strict_interval"] == [1.0, 1.0]


def test_interval_of_the_overall_score_resamples_within_tasks() -> None:
    """A task that is always right and one that never is: nothing to resample between them."""
    certain = [_sample(tag, f"{tag}{p}", right, True) for tag, right in (("color", 1), ("count", 0)) for p in range(20)]
    assert summarise(certain, version=0)["task_mean_interval"] == [0.5, 0.5]
    result = summarise(_random(1, 0.5), version=0)
    low, high = result["task_mean_interval"]
    assert low < result["task_mean"] < high
    assert high - low == pytest.approx(result["strict_interval"][1] - result["strict_interval"][0], rel=0.15)


def test_comparison_pairs_prompts() -> None:
    rows = _random(0, 0.4)
    better = [
        Sample(**{**vars(row), "strict": 1.0, "reasoning_correct": True}) if i % 4 == 0 else row
        for i, row in enumerate(rows)
    ]
    before, after = summarise(rows, version=0), summarise(better, version=9)
    change = compare(before, after)
    strict = change["strict"]
    assert strict["difference"] == pytest.approx(after["strict"] - before["strict"])
    assert strict["interval"][0] < strict["difference"] < strict["interval"][1]
    # The prompts' own spread cancels: the interval is narrower than either result's.
    width = strict["interval"][1] - strict["interval"][0]
    assert 0.02 < width < 0.7 * (before["strict_interval"][1] - before["strict_interval"][0])
    assert change["reasoning_accuracy"]["interval"][0] > 0
    assert change["by_tag"]["color"]["difference"] == pytest.approx(
        after["by_tag"]["color"]["strict"] - before["by_tag"]["color"]["strict"]
    )
    same = compare(before, before)["strict"]
    assert (same["difference"], same["interval"]) == (0.0, [0.0, 0.0])


def test_comparison_uses_the_common_prompts() -> None:
    before, after = summarise(ROWS, version=0), summarise([*ROWS[:2], _sample("new", "z", 1)], version=1)
    change = compare(before, after)
    assert change["n_prompts"] == 1
    assert (change["strict"]["before"], change["strict"]["after"]) == (0.5, 0.5)
    assert change["task_mean"] == {"before": 0.5, "after": 0.5, "difference": 0.0}
    assert change["by_tag"]["color"] == {"before": 0.5, "after": 0.5, "difference": 0.0}
    assert change["by_tag"]["new"] == {"before": None, "after": None, "difference": None}
    assert table(before, after)[-1] == ("new", "–", "100.0 %", "–")
    with pytest.raises(ValueError, match="no prompt in common"):
        compare(before, summarise([_sample("new", "z", 1)], version=1))


def test_comparison_reads_back_from_json() -> None:
    before, after = summarise(_random(0, 0.4), version=0), summarise(_random(1, 0.6), version=1)
    assert compare(json.loads(dump_json(before)), json.loads(dump_json(after))) == compare(before, after)


def test_what_no_scorer_calls_right_or_wrong_is_no_accuracy() -> None:
    rows = [_sample("color", prompt, reward) for prompt, reward in (("a", 2.5), ("a", 3.5), ("b", 1.0))]
    before = summarise(rows, version=0, judge="reward")
    after = summarise(_with(rows, strict=3.25), version=1, judge="reward")
    assert [row.right for row in rows] == [None, None, True]
    lines = {name: cells for name, *cells in table(before, after)}
    assert lines["Mean reward"][0].startswith("2.333 (") and lines["color"] == ["2.333", "3.250", "+0.917"]
    assert "Strict accuracy" not in to_markdown(after)


def test_a_bar_in_a_task_does_not_break_the_table() -> None:
    text = to_markdown(summarise([_sample("a|b", "p", 1)], version=0))
    assert "| a\\|b | 100.0 % |" in text


def test_markdown_has_every_row_and_column() -> None:
    before, after = summarise(ROWS, version=0), summarise(_with(ROWS, strict=1.0), version=1)
    alone = to_markdown(before)
    assert alone.startswith("3 prompts x 2 images\n")
    assert "| count | 0.0 % |\n" in alone
    assert "| Reasoning accuracy | 50.0 % |\n" in alone
    both = to_markdown(after, before)
    assert "|  | before | after | difference |\n| --- | --- | --- | --- |\n| Strict accuracy | 50.0 % (" in both
    assert "| count | 0.0 % | 100.0 % | +100.0 |\n" in both
    assert (PERCENT.value(None), PERCENT.value(0.3125)) == ("–", "31.2 %")


def _with(rows: list[Sample], **changes: Any) -> list[Sample]:
    return [Sample(**{**vars(row), **changes}) for row in rows]


def test_ta_is_the_mean_over_images_and_changes_pair_by_prompt() -> None:
    shares = [1, 0.5, 0.75, 0.75, 0.25, math.nan]
    before = summarise([Sample(**{**vars(r), "ta": t}) for r, t in zip(ROWS, shares, strict=True)], version=0)
    assert before["ta"] == pytest.approx(3.25 / 5)
    assert before["by_tag"]["count"]["ta"] == pytest.approx(0.25)
    assert before["ta_interval"][0] < before["ta"] < before["ta_interval"][1]
    after = summarise(_with(ROWS, ta=1.0), version=1)
    assert compare(before, after)["ta"]["difference"] == pytest.approx(1 - 3.25 / 5)
    assert compare(before, after)["ta"]["interval"][0] > 0
    assert table(before)[2][1].startswith("65.0 % (")


def test_grid_shows_prompts_in_rows_with_right_and_wrong_framed() -> None:
    def shade(prompt: str, value: int, strict: float, size: int = 8) -> Sample:
        png = encode_png(np.full((size, size, 3), value, np.uint8))
        # An untrained policy says anything: controls, separators, halves of characters.
        said = "<think> plan \u2192 \u4e2d \x1e b\u2029c\x85\x00\ud800 </think>"
        return Sample("t", prompt, said, strict, 0.5, None, png)

    grid = sample_grid([shade("a", 10, 1), shade("a", 20, 0), shade("b", 40, math.nan, 300)])
    pixels = np.asarray(grid)
    assert pixels.shape[1] == GAP + 2 * (CELL + GAP)
    rows = [np.flatnonzero((pixels == value).all(2).sum(1) >= CELL) for value in (10, 20, 40)]
    assert [len(r) for r in rows] == [CELL] * 3
    assert (rows[0] == rows[1]).all() and rows[2][0] > rows[0][-1]
    frame = pixels[rows[0][0] - 2]
    left, right = frame[GAP + CELL // 2], frame[2 * GAP + CELL + CELL // 2]
    assert left[1] > left[0] and right[0] > right[1]
    assert (pixels[rows[2][0] - 2, GAP + CELL // 2] == 255).all()
    with pytest.raises(ValueError, match=r"evaluation\.samples"):
        sample_grid([])
