"""In which order the suite runs, and what stays together when several workers share it (`-n 2`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

GOLDEN = "golden"
LONGEST = (
    "test_pool",
    "test_end_to_end",
    "test_chaos",
    GOLDEN,
    "test_job_submit",
    "test_composed_end_to_end",
    "test_sft",
    "test_reward_pool",
    "test_autoscaling",
    "test_plan",
)
"""What takes about a minute of a worker or more, longest first, so that the workers end together."""


def place(item: pytest.Item) -> tuple[int, bool]:
    """The longest come first, and what looks at all that the other tests did comes last."""
    scope = scope_of(item.path)
    order = LONGEST.index(scope) if scope in LONGEST else len(LONGEST)
    return order, item.path.name == "test_golden_is_read.py"


@cache
def reads_golden(path: Path) -> bool:
    """Whether a test file reads recorded numbers."""
    return "golden_numbers import" in path.read_text()


def scope_of(path: Path) -> str:
    """A file's tests stay together, as do all that read recorded numbers, since the last test asks what was read."""
    return GOLDEN if reads_golden(path) else path.stem


class Together(LoadScopeScheduling):
    """Every scope stays on one worker."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(self.config.rootpath / nodeid.split("::")[0])
