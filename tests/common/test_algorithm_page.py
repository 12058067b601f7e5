"""docs/algorithm.md names fields, functions and tests that exist, and every field of the objective is in it."""

from __future__ import annotations

import re
from functools import reduce

from common.config import REPOSITORY, Objective, TrainConfig

PAGE = (REPOSITORY / "docs" / "algorithm.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| the paper", "| identity"))
]
NAMED = re.compile(r"`([^`]+)`")


def sources(*folders: str) -> str:
    return "\n".join(path.read_text() for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py")))


def test_every_test_exists() -> None:
    tests = sources("tests")
    named = [name for row in ROWS for name in NAMED.findall(row[-1])]
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_function_exists() -> None:
    code = sources("common", "rollout", "learner", "deploy")
    names = [part for row in ROWS if len(row) == 4 for name in NAMED.findall(row[1]) for part in name.split(".")]
    assert [name for name in names if not re.search(rf"^ *(def|class) {name}\b|^{name} = ", code, re.M)] == []


def test_every_field_exists_and_none_of_the_objective_is_left_out() -> None:
    named = {name for row in ROWS if len(row) == 4 for name in NAMED.findall(row[2])}
    for name in named:
        reduce(getattr, name.split("."), TrainConfig())
    assert {f"objective.{field}" for field in Objective.model_fields} <= named
