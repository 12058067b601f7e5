"""The prompt lists: what they hold and what they keep apart."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.shapes.prompts import DATA, HELD_OUT_PROMPTS, OPENERS, load, main, make_prompts
from common.shapes.requests import requests
from common.shapes.score import validate_metadata
from common.shapes.vocab import RIDDLES, TAGS, riddles_in

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lists() -> tuple[Records, Records]:
    return make_prompts()


def _combinations(records: Records) -> set[tuple[str, ...]]:
    by_body = {r.body: (tag, r.kind, *r.combination) for tag, pool in requests(random.Random(0)).items() for r in pool}
    bodies = [next(r["prompt"][len(o) + 1 :] for o in OPENERS if r["prompt"].startswith(o + " ")) for r in records]
    return {by_body[body] for body in bodies}


def test_train_and_heldout_share_no_combination(lists: tuple[Records, Records]) -> None:
    train, heldout = lists
    assert not _combinations(train) & _combinations(heldout)


def test_heldout_relations_are_not_trained_the_other_way_round(lists: tuple[Records, Records]) -> None:
    def pairs(records: Records) -> set[tuple[str, ...]]:
        turned = {"right of": "left of", "below": "above"}
        found: set[tuple[str, ...]] = set()
        for record in records:
            if record["tag"] == "position":
                reference, subject = (entry["class"] for entry in record["include"])
                relation = record["include"][1]["position"][0]
                turn = relation in turned
                first, second = (reference, subject) if turn else (subject, reference)
                found.add((turned.get(relation, relation), first, second))
        return found

    train, heldout = lists
    assert pairs(heldout)
    assert not pairs(train) & pairs(heldout)


def test_ids_and_prompts_are_unique(lists: tuple[Records, Records]) -> None:
    records = lists[0] + lists[1]
    for key in ("id", "prompt"):
        assert len({record[key] for record in records}) == len(records)


def test_every_heldout_word_is_trained(lists: tuple[Records, Records]) -> None:
    train, heldout = ({word.strip(",") for r in records for word in r["prompt"].split()} for records in lists)
    assert not heldout - train


def test_every_riddle_is_asked_in_both(lists: tuple[Records, Records]) -> None:
    for records in lists:
        assert {riddle for record in records for riddle in riddles_in(record["prompt"])} == set(RIDDLES)


def test_only_reasoning_prompts_have_riddles(lists: tuple[Records, Records]) -> None:
    for record in lists[0] + lists[1]:
        assert bool(riddles_in(record["prompt"])) == (record["tag"] == "reasoning")


def test_sizes(lists: tuple[Records, Records]) -> None:
    train, heldout = lists
    assert 1500 <= len(train) <= 2500
    assert {record["tag"] for record in train} == set(TAGS)
    assert Counter(record["tag"] for record in heldout) == HELD_OUT_PROMPTS
    assert len(heldout) == 240


def test_metadata_is_valid_and_penalises_surplus(lists: tuple[Records, Records]) -> None:
    for record in lists[0] + lists[1]:
        validate_metadata(record)
        total = sum(entry["count"] for entry in record["include"])
        assert 1 <= total <= 4
        assert {"class": "object", "count": total + 1} in record["exclude"]
        if record["tag"] == "counting":
            assert total >= 2


def test_the_seed_decides() -> None:
    assert make_prompts(1) == make_prompts(1)
    assert make_prompts(1) != make_prompts(2)


def test_data_files_are_what_the_generator_makes(lists: tuple[Records, Records], tmp_path: Path) -> None:
    main(str(tmp_path / "new"))
    for name, records in zip(("train", "heldout"), lists, strict=True):
        assert load(DATA / f"{name}.jsonl") == records
        assert (tmp_path / "new" / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["heldout.jsonl", "train.jsonl"]
