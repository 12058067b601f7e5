"""Prompt files and the order in which a run takes prompts from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ConfigError
from common.types import Prompt


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a .jsonl or .parquet file. Every record needs `prompt`; `id` defaults to its line; everything else
    (tag, include, exclude) is the metadata that scorers read. ConfigError naming file, line, field and remedy."""
    if not path.is_file():
        raise ConfigError(f"prompt file {path} does not exist; correct data.train or data.heldout")
    if path.suffix not in {".jsonl", ".parquet"}:
        raise ConfigError(f"prompt file {path} ends in {path.suffix!r}; give a .jsonl or .parquet file")
    prompts = [_prompt(record, path, number) for number, record in _records(path)]
    if not prompts:
        raise ConfigError(f"prompt file {path} has no prompts")
    seen: dict[str, int] = {}
    for number, prompt in enumerate(prompts, 1):
        if prompt.id in seen:
            raise ConfigError(f"{path}: id {prompt.id!r} of prompt {number} is that of prompt {seen[prompt.id]} too")
        seen[prompt.id] = number
    return prompts


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"prompt file {path} is not readable Parquet ({error})") from error
        yield from enumerate((_with_indices(_without_nulls(row)) for row in table.to_pylist()), 1)
        return
    try:
        # Not splitlines: a JSON string may hold U+2028 and other separators as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = _without_nulls(json.loads(line))
            except (ValueError, RecursionError) as error:  # also of numbers and nesting beyond Python's limits
                raise ConfigError(f"{path}, line {number} is not JSON ({error}); mend or remove it") from error
            yield number, record


def _prompt(record: Any, path: Path, number: int) -> Prompt:
    if not isinstance(record, Mapping):
        raise ConfigError(f"{path}, line {number} is a {type(record).__name__}; every line is an object")
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{path}, line {number}: prompt is {text!r}; it must be text")
    for key, value in record.items():
        check_characters(json.dumps(value, ensure_ascii=False, default=str), f"{path}, line {number}: {key}")
    metadata = {k: v for k, v in record.items() if k not in {"id", "prompt"}}
    identity = record.get("id")
    return Prompt(f"line-{number}" if identity in (None, "") else str(identity), text, metadata)


def check_characters(text: str, name: str) -> None:
    """ConfigError for halves of surrogate pairs, which neither a tokenizer nor a file takes: a cut JSON escape, or
    bytes that are no UTF-8 on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ConfigError(f"{name} {text!r} holds half a character, {half}; remove or replace it") from error


def _without_nulls(value: Any) -> Any:
    """Parquet has one set of columns for all rows and fills the absent ones with null."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _with_indices(record: dict[str, Any]) -> dict[str, Any]:
    """Parquet has one type for all entries of a list, so that the index in a `position` has to be text there."""
    for entry in record.get("include") or ():
        match entry:
            case {"position": [relation, str(index)]} if index.isdecimal() and len(index) < 9:
                entry["position"] = [relation, int(index)]
    return record


class PromptOrder:
    """Which prompts each step uses: whole passes over the file, each in an order of its own. A function of the step
    alone, so a resumed run goes on exactly where it was."""

    def __init__(self, prompts: list[Prompt], per_step: int, seed: int) -> None:
        self.prompts, self.per_step, self.seed = prompts, per_step, seed

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of one step."""
        first = step * self.per_step
        return [self._at(place) for place in range(first, first + self.per_step)]

    def others(self, step: int, count: int, tried: Set[str]) -> list[Prompt]:
        """At most `count` prompts for a step beside those whose ids have been tried; fewer when the file runs out."""
        drawn = np.random.default_rng([self.seed, step]).permutation(len(self.prompts))
        return [self.prompts[place] for place in drawn if self.prompts[place].id not in tried][:count]

    def _at(self, place: int) -> Prompt:
        turn, offset = divmod(place, len(self.prompts))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.prompts))
        return self.prompts[order[offset]]


def evenly(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` prompts (0: all), tags in turn, in file order."""
    if not count or count >= len(prompts):
        return prompts
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(str(prompt.metadata.get("tag", "")), []).append(prompt)
    turns = max(len(pool) for pool in by_tag.values())
    ordered = [pool[turn] for turn in range(turns) for pool in by_tag.values() if turn < len(pool)]
    return ordered[:count]
