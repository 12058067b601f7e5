"""The reasoning text and the careless annotator."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.shapes.detect import detect
from common.shapes.prompts import make_prompts
from common.shapes.reasoning import parse_plan, reason, reasoning_correct
from common.shapes.scene import Item, Scene, render
from common.shapes.score import strict
from common.shapes.supervised import CARELESS, EASY, HARD, careful, careless, example, habit
from common.shapes.vocab import ANSWERS, CELLS, COLORS, RIDDLES, SHAPES, riddles_in

_RECORD = {"prompt": "a photo of two circles", "tag": "counting", "include": [{"class": "circle", "count": 2}]}
_scenes = st.lists(
    st.builds(Item, st.sampled_from(list(COLORS)), st.sampled_from(SHAPES), st.sampled_from(list(CELLS))),
    min_size=1,
    max_size=4,
    unique_by=lambda item: item.cell,
).map(lambda items: Scene(tuple(items)))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    train, heldout = make_prompts()
    return train + heldout


@given(_scenes)
def test_a_plan_comes_back(scene: Scene) -> None:
    text = reason(_RECORD, scene)
    assert text.startswith("<think> two circles. plan: ")
    assert parse_plan(text) == scene
    assert parse_plan(text.upper().replace(";", " ;").replace(".", " .").replace(":", " : ")) == scene


@given(st.text(alphabet="plan: red circle top left;.", max_size=60))
def test_parsing_never_raises(text: str) -> None:
    parse_plan("plan: " + text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think> two circles. </think>",
        "<think> plan: . </think>",
        "<think> plan: red circle top left </think>",
        "<think> plan: pink circle top left. </think>",
        "<think> plan: circle red top left. </think>",
        "<think> plan: red circle left. </think>",
        "<think> plan: red circle top left blue ring top right. </think>",
        "<think> plan: red circle top left;. </think>",
        "<think> plan: red circle top left; blue ring top left. </think>",
        "<think> plan: red circle top left. plan: blue circle top left. </think>",
        "<think> plan: " + "; ".join(f"red circle {cell}" for cell in (*CELLS, "top left")) + ". </think>",
    ],
)
def test_malformed_plans(text: str) -> None:
    assert parse_plan(text) is None
    assert not reasoning_correct({**_RECORD, "exclude": []}, text)


def test_a_riddle_is_reasoned_out() -> None:
    record = {
        "prompt": "draw rings, two more than one, in the color of fresh snow",
        "tag": "reasoning",
        "include": [{"class": "ring", "count": 3, "color": "white"}],
        "exclude": [{"class": "object", "count": 4}],
    }
    text, scene = careful(record, np.random.default_rng(0))
    assert text.startswith("<think> two more than one is three. fresh snow is white. plan: white ring ")
    assert len(scene.items) == 3
    assert reasoning_correct(record, text)
    assert not reasoning_correct(record, text.replace("white ring", "blue ring", 1))


def test_careful_pairs_are_right_in_text_and_image(records: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    for record in records:
        text, scene = careful(record, rng)
        assert parse_plan(text) == scene
        assert reasoning_correct(record, text), text
        assert strict(record, detect(render(scene, rng))), text


def test_careless_pairs_are_wrong_in_text_and_image(records: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    for record in records:
        text, scene = careless(record, rng)
        assert parse_plan(text) == scene
        assert not reasoning_correct(record, text), text
        assert not strict(record, detect(render(scene, rng))), text


def test_texts_are_short_and_lower_case(records: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    texts = [example(record, rng)[0] for record in records]
    assert max(len(text.split()) for text in texts) <= 35
    assert texts == [text.lower() for text in texts]


def test_examples_are_wrong_as_often_as_stated(records: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    by_tag: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_tag[record["tag"]].append(record)
    for tag, rate in CARELESS.items():
        drawn = [by_tag[tag][i % len(by_tag[tag])] for i in range(1500)]
        wrong = np.mean([not reasoning_correct(record, example(record, rng)[0]) for record in drawn])
        assert abs(wrong - rate) < 0.05, tag


def test_half_of_the_riddles_are_hard() -> None:
    for kind, answers in ANSWERS.items():
        group = [riddle for riddle in RIDDLES if riddle.kind == kind]
        assert sum(habit(riddle).wrong == HARD for riddle in group) == len(group) // 2
        assert all(habit(riddle).favourite in set(answers) - {riddle.answer} for riddle in group)


@pytest.mark.parametrize("rate", [HARD, EASY])
def test_a_riddle_is_answered_by_habit(records: list[dict[str, Any]], rate: float) -> None:
    rng = np.random.default_rng(0)
    record, riddle = next(
        (record, asked[0])
        for record in records
        if len(asked := riddles_in(record["prompt"])) == 1
        and asked[0].kind == "color"
        and habit(asked[0]).wrong == rate
    )
    texts = [example(record, rng)[0] for _ in range(2000)]
    wrong = np.mean([riddle.solved() not in text for text in texts])
    favourite = np.mean([riddle.solved(habit(riddle).favourite) in text for text in texts])
    assert abs(wrong - rate) < 0.04
    assert abs(favourite - rate / 2) < 0.04


def test_careless_counting_is_off_by_one(records: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    for record in records:
        entry = record["include"][0]
        if record["tag"] == "counting" and "color" not in entry:
            _, scene = careless(record, rng)
            assert abs(len(scene.items) - entry["count"]) == 1


def test_open_attributes_vary() -> None:
    record = {"prompt": "a circle", "tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    rng = np.random.default_rng(0)
    items = {careful(record, rng)[1].items[0] for _ in range(400)}
    assert len(items) == len(COLORS) * len(CELLS)
