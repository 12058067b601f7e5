"""Prompt files and the order in which a run takes prompts from them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ConfigError
from common.prompts import PromptOrder, evenly, read_prompts
from common.types import Prompt

RECORDS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "a red circle", "tag": "single", "include": [{"class": "circle", "count": 1}]},
    {
        "id": "b",
        "prompt": "zwei Sterne, grün",
        "tag": "two",
        "include": [{"class": "star", "count": 2, "color": "green"}],
        "exclude": [{"class": "star", "count": 3}],
    },
    {"id": "c", "prompt": "nothing else", "tag": "single"},
]


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def some_prompts(count: int, tags: int = 1) -> list[Prompt]:
    return [Prompt(str(i), f"prompt {i}", {"tag": f"t{i % tags}"}) for i in range(count)]


def test_jsonl_and_parquet_hold_the_same_prompts(tmp_path: Path) -> None:
    from_lines = read_prompts(lines(tmp_path / "p.jsonl", RECORDS))
    columns = dict.fromkeys(key for record in RECORDS for key in record)
    table = pa.table({key: [record.get(key) for record in RECORDS] for key in columns})
    pq.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == from_lines
    assert [(p.id, p.text) for p in from_lines] == [(r["id"], r["prompt"]) for r in RECORDS]
    assert [dict(p.metadata) for p in from_lines] == [
        {k: v for k, v in record.items() if k not in ("id", "prompt")} for record in RECORDS
    ]


def test_a_relation_can_be_said_in_parquet(tmp_path: Path) -> None:
    """Whose lists hold one type: the index is text there."""
    square, circle = {"class": "square", "count": 1}, {"class": "circle", "count": 1}
    of_lines = {"prompt": "p", "tag": "position", "include": [square, circle | {"position": ["left of", 0]}]}
    of_lines |= {"note": {"position": ["left of", "0"]}}  # whatever another scorer means by it
    of_table = of_lines | {"include": [square, circle | {"position": ["left of", "0"]}]}
    pq.write_table(pa.Table.from_pylist([of_table]), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == read_prompts(lines(tmp_path / "p.jsonl", [of_lines]))


def test_ids_default_to_the_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n\n   \n{"prompt": "two"}\r\n{"id": 0, "prompt": "three"}')
    assert [(p.id, p.text) for p in read_prompts(path)] == [("line-1", "one"), ("line-4", "two"), ("0", "three")]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    assert read_prompts(lines(tmp_path / "p.jsonl", [{"prompt": text}]))[0].text == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "line 2 is not JSON"),
        ('{"prompt": "x", "n": ' + "9" * 5000 + "}", "line 2 is not JSON (Exceeds the limit"),
        ("[" * 100_000, "line 2 is not JSON (maximum recursion depth"),
        (r'{"prompt": "a \ud83d circle"}', r"holds half a character, '\ud83d'; remove or replace it"),
        (r'{"prompt": "x", "tag": "\ud83d"}', "line 2: tag '"),
        ('{"prompt": "x", "note": ' + "[" * 700 + "]" * 700 + "}", "line 2 is not JSON (maximum recursion depth"),
        ("[1, 2]", "line 2 is a list; every line is an object"),
        ('{"prompt": 7}', "line 2: prompt is 7; it must be text"),
        ('{"text": "x"}', "line 2: prompt is None; it must be text"),
        ('{"prompt": "  "}', "line 2: prompt is '  '; it must be text"),
        ('{"id": "first", "prompt": "x"}', "id 'first' of prompt 2 is that of prompt 1 too"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"id": "first", "prompt": "good"}\n' + line + "\n")
    with pytest.raises(ConfigError) as error:
        read_prompts(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"prompt\n", "ends in '.csv'; give a .jsonl or .parquet file"),
        ("p.jsonl", b"\n\n", "has no prompts"),
        ("p.jsonl", b'{"prompt": "\xff"}', "is not UTF-8 text"),
        ("p.parquet", b"PAR1 not really", "is not readable Parquet"),
        ("p.jsonl", None, "does not exist; correct data.train or data.heldout"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        read_prompts(tmp_path / name)


def test_order_is_a_function_of_the_step_only() -> None:
    prompts = some_prompts(11)
    order = PromptOrder(prompts, 4, seed=3)
    straight = [order.batch(step) for step in range(12)]
    resumed = PromptOrder(prompts, 4, seed=3)
    assert [resumed.batch(step) for step in reversed(range(12))] == straight[::-1]
    assert [PromptOrder(prompts, 4, seed=4).batch(step) for step in range(12)] != straight


@given(count=st.integers(1, 30), per_step=st.integers(1, 12), seed=st.integers(0, 2**32))
@settings(max_examples=50)
def test_every_prompt_comes_once_per_pass(count: int, per_step: int, seed: int) -> None:
    order = PromptOrder(some_prompts(count), per_step, seed)
    taken = [prompt.id for step in range(2 * count) for prompt in order.batch(step)]
    for start in range(0, len(taken), count):
        part = taken[start : start + count]
        if len(part) == count:
            assert Counter(part) == Counter(str(i) for i in range(count))


def test_passes_have_different_orders() -> None:
    order = PromptOrder(some_prompts(30), 30, seed=0)
    assert order.batch(0) != order.batch(1)


def test_evenly_takes_tags_in_turn() -> None:
    prompts = [
        Prompt(f"{tag}{i}", "x", {"tag": tag}) for tag, count in (("a", 5), ("b", 1), ("c", 3)) for i in range(count)
    ]
    assert [p.id for p in evenly(prompts, 6)] == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert evenly(prompts, 0) == evenly(prompts, 99) == prompts
