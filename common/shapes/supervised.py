"""Supervised pairs from an annotator who is careless at a known rate, so that RL has something to correct.

Text and scene always agree with each other; a careless pair reasons wrongly and draws what it reasoned.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.shapes.reading import Reading, Want, draw_scene, read
from common.shapes.reasoning import reason
from common.shapes.scene import Scene
from common.shapes.vocab import ANSWERS, COLORS, NUMBERS, OPPOSITE, RELATIONS, RIDDLES, SHAPES, Riddle, riddles_in

# "reasoning" is nominal: there every riddle has a rate of its own, see habit().
CARELESS: dict[str, float] = {
    "single_object": 0.1, "colors": 0.15, "two_object": 0.25, "counting": 0.35,
    "position": 0.4, "color_attr": 0.35, "reasoning": 0.5,
}  # fmt: skip
HARD, EASY = 0.75, 0.2  # how often the riddles of either half are answered wrongly
_FAVOURITE = 0.5  # share of a riddle's wrong answers that are the same one

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Habit:
    """How the annotator treats one riddle: how often wrongly, and with which favourite wrong answer."""

    wrong: float
    favourite: str


def _habits() -> dict[str, Habit]:
    rng = random.Random(0)
    habits: dict[str, Habit] = {}
    for kind in ANSWERS:
        group = [riddle for riddle in RIDDLES if riddle.kind == kind]
        hard = rng.sample(range(len(group)), len(group) // 2)
        for index, riddle in enumerate(group):
            others = [a for a in ANSWERS[kind] if a != riddle.answer]
            habits[riddle.phrase] = Habit(HARD if index in hard else EASY, rng.choice(others))
    return habits


_HABITS = _habits()


def habit(riddle: Riddle) -> Habit:
    """The annotator's habit for a riddle of the vocabulary; fixed once and for all."""
    return _HABITS[riddle.phrase]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: Sequence[str], *used: str | None) -> str:
    return _pick(rng, [option for option in options if option not in used])


def _misread(tag: str, reading: Reading, rng: np.random.Generator) -> Reading:
    """A plausible mistake for a prompt without riddles; no scene that fits the result is right."""
    wants = reading.wants
    shapes = [want.shape for want in wants]
    at = int(rng.integers(len(wants)))

    def change(**fields: Any) -> Reading:
        return replace(reading, wants=(*wants[:at], replace(wants[at], **fields), *wants[at + 1 :]))

    def missing() -> Reading:
        return Reading(wants[:at] + wants[at + 1 :])

    def extra() -> Reading:
        return replace(reading, wants=(*wants, Want(1, _pick(rng, SHAPES))))

    def other_shape() -> Reading:
        return change(shape=_other(rng, SHAPES, *shapes))

    def other_color() -> Reading:
        return change(color=_other(rng, tuple(COLORS), wants[at].color))

    luck = rng.random()
    if tag == "counting":
        if wants[at].color and luck > 0.8:
            return other_color()
        near = [n for n in NUMBERS.values() if abs(n - wants[at].count) == 1]
        return change(count=near[int(rng.integers(len(near)))])
    if tag == "position" and reading.relation:
        opposite = OPPOSITE[reading.relation]
        across = _other(rng, RELATIONS, reading.relation, opposite)
        return missing() if luck < 0.1 else replace(reading, relation=across if luck < 0.3 else opposite)
    if tag == "color_attr":
        first, second = wants
        if luck < 0.6:
            return Reading((replace(first, color=second.color), replace(second, color=first.color)))
        return other_color() if luck < 0.85 else missing()
    if tag == "two_object":
        return missing() if luck < 0.5 else other_shape() if luck < 0.75 else extra()
    if tag == "colors":
        return other_color() if luck < 0.7 else other_shape()
    return other_shape() if luck < 0.5 else extra()


def _misanswer(riddle: Riddle, rng: np.random.Generator) -> str:
    favourite = habit(riddle).favourite
    others = [a for a in ANSWERS[riddle.kind] if a not in (riddle.answer, favourite)]
    return favourite if rng.random() < _FAVOURITE else _pick(rng, others)


def _answered(record: Record, answers: Mapping[Riddle, str]) -> Reading:
    """The reading that follows from these answers to the prompt's riddles, right or wrong."""
    reading = read(record)
    for riddle, answer in answers.items():
        if riddle.kind == "relation":
            reading = replace(reading, relation=answer)
            continue
        field = "count" if riddle.kind == "number" else riddle.kind
        value: int | str = NUMBERS[answer] if riddle.kind == "number" else answer
        first = replace(reading.wants[0], **{field: value})  # type: ignore[arg-type]
        reading = replace(reading, wants=(first, *reading.wants[1:]))
    return replace(reading, facts=tuple(riddle.solved(answer) for riddle, answer in answers.items()))


def _pair(record: Record, reading: Reading, rng: np.random.Generator) -> tuple[str, Scene]:
    scene = draw_scene(reading, rng)
    return reason(record, scene, reading), scene


def careful(record: Record, rng: np.random.Generator) -> tuple[str, Scene]:
    """A right pair for a prompt record."""
    return _pair(record, read(record), rng)


def careless(record: Record, rng: np.random.Generator) -> tuple[str, Scene]:
    """A wrong pair for a prompt record: a riddle misanswered or, without riddles, the request misread."""
    asked = riddles_in(record["prompt"])
    if not asked:
        return _pair(record, _misread(record["tag"], read(record), rng), rng)
    wrong = asked[int(rng.integers(len(asked)))]
    return _pair(record, _answered(record, {r: _misanswer(r, rng) if r is wrong else r.answer for r in asked}), rng)


def example(record: Record, rng: np.random.Generator) -> tuple[str, Scene]:
    """One supervised pair for a prompt record: reasoning text and the scene it plans.

    Wrong with probability `CARELESS[tag]`, or for each riddle on its own with its `habit`.
    """
    asked = riddles_in(record["prompt"])
    if asked:
        answers = {r: _misanswer(r, rng) if rng.random() < habit(r).wrong else r.answer for r in asked}
        return _pair(record, _answered(record, answers), rng)
    return (careless if rng.random() < CARELESS[record["tag"]] else careful)(record, rng)
