"""Finished cells (row x seed): small JSON files that are committed, so that the set can be continued at another time
and on another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError, model_validator

from common.config import ConfigError
from common.rundir import dump_json, replacing
from deploy.evaluation import Result
from deploy.reproduction.rows import ROWS, Plan, origin, trains

Cell = dict[str, Any]
CURVES = ("reward/mean", "reward/shapes/strict", "reward/shapes/ta")
"""Metrics of every training step that a cell keeps: what is trained on, and the truth."""


class _Outcome(BaseModel):
    """What the page needs of a cell's evaluation, by prompt."""

    tags: list[str]
    images: list[float]
    strict: list[float]
    ta: list[float]
    ta_images: list[float]

    @model_validator(mode="after")
    def _alike(self) -> _Outcome:
        lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"its columns differ in length: {lengths}")
        return self


class _Cell(BaseModel):
    """What a cell must have to be one."""

    row: str
    seed: int
    origin: dict[str, Any]
    minutes: float
    wall_minutes: float
    finished: str
    machine: str
    dtypes: list[str]
    result: _Outcome
    curves: dict[str, list[float | None]]

    @model_validator(mode="after")
    def _drawn(self) -> _Cell:
        if absent := [name for name in CURVES if name not in self.curves]:
            raise ValueError(f"its curves lack {', '.join(absent)}")
        return self


@dataclass(frozen=True)
class Stored:
    """What lies under a plan's directory. cells: those of this plan's origin, by row in the order of ROWS, seeds
    ascending; stale: (row, seed) of the others, with what differs."""

    cells: Mapping[str, Sequence[Cell]]
    stale: Mapping[tuple[str, int], str]

    def has(self, row: str, seed: int) -> bool:
        return any(cell["seed"] == seed for cell in self.cells.get(row, ()))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({cell["seed"] for cells in self.cells.values() for cell in cells}))


def cell_file(plan: Plan, row: str, seed: int) -> Path:
    return plan.out / "cells" / f"{row}-seed{seed}.json"


def write_cell(plan: Plan, cell: Cell) -> None:
    """Whole or not at all; takes the place of a stale one."""
    with replacing(cell_file(plan, cell["row"], cell["seed"])) as aside:
        aside.write_bytes(dump_json(cell) + b"\n")


def read_cells(plan: Plan) -> Stored:
    """ConfigError naming a file that is no cell, or not the one that its name says."""
    found: dict[str, list[Cell]] = {row: [] for row in ROWS}
    stale: dict[tuple[str, int], str] = {}
    for path in sorted((plan.out / "cells").glob("*.json")):
        try:
            read = _Cell.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
            raise ConfigError(f"{path} is not a cell ({problem}); remove it, and it is run again") from error
        cell: Cell = json.loads(path.read_bytes())
        row, seed, had = read.row, read.seed, read.origin
        if path != cell_file(plan, row, seed):
            raise ConfigError(f"{path} holds the cell {row} seed {seed}; remove it, or give it that cell's name")
        differs = _differs(plan, row, had)
        if differs:
            stale[row, seed] = ", ".join(differs)
        else:
            found[row].append(cell)
    cells = {row: sorted(of_row, key=lambda cell: cell["seed"]) for row, of_row in found.items() if of_row}
    return Stored(cells, stale)


def _differs(plan: Plan, row: str, had: Mapping[str, Any]) -> list[str]:
    """In what a cell's origin is another than the plan's for its row."""
    if row not in ROWS:
        return ["row"]
    try:
        asked = origin(plan, row)
    except ConfigError:  # the overrides contradict this row's recipe, and were never what made its cells
        return ["recipe"]
    return [key for key, value in asked.items() if had.get(key) != value]


def missing(plan: Plan, stored: Stored) -> list[tuple[str, int]]:
    """What the plan still asks for, one seed of all rows after the other; a row without training once."""
    once = {row for row in plan.rows if not trains(plan, row)}
    return [
        (row, seed)
        for seed in plan.seeds
        for row in plan.rows
        if not (stored.has(row, seed) if row not in once else row in stored.cells or seed != plan.seeds[0])
    ]


def minutes_left(plan: Plan, stored: Stored, left: Sequence[tuple[str, int]]) -> float | None:
    """Wall minutes of the cells that are left: as those of their row, or else by steps at the pace of all cells. None
    as long as no cell has trained."""
    by_row = {row: float(np.mean([cell["wall_minutes"] for cell in cells])) for row, cells in stored.cells.items()}
    trained = [cell for cells in stored.cells.values() for cell in cells if sum(cell["origin"]["steps"])]
    if not trained:
        return None
    pace = sum(cell["wall_minutes"] for cell in trained) / sum(sum(cell["origin"]["steps"]) for cell in trained)
    return sum(by_row.get(row, pace * sum(origin(plan, row)["steps"])) for row, _ in left)


def digest(result: Result) -> Result:
    """What the page needs of an evaluation: counts by prompt, in the order that every evaluation of the file has."""
    columns = ("images", "strict", "ta", "ta_images")
    tags = [prompt["tag"] for prompt in result["prompts"]]
    counts = {name: [rounded(prompt[name]) for prompt in result["prompts"]] for name in columns}
    headlines = {name: result[name] for name in ("strict", "task_mean", "ta", "reasoning_accuracy")}
    return {**headlines, "unscored": result["unscored"], "tags": tags, **counts}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
