"""In which order the suite runs, and what stays together when several workers share it (`-n 2`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

WHOLE_RUNS = (
    "test_chaos",
    "test_end_to_end",
    "test_job_submit",
    "test_pool",
    "test_composed_end_to_end",
    "test_autoscaling",
)
"""Files that mostly wait for Ray's processes. The longest begin first, so that the workers end together."""


def place(item: pytest.Item) -> int:
    """Whole runs come first, and what looks at all that the other tests did comes last."""
    if item.path.stem in WHOLE_RUNS:
        return WHOLE_RUNS.index(item.path.stem)
    return len(WHOLE_RUNS) + (item.path.name == "test_golden_is_read.py")


@cache
def reads_golden(path: Path) -> bool:
    """Whether a test file reads recorded numbers."""
    return "golden_numbers import" in path.read_text()


class Together(LoadScopeScheduling):
    """A file stays on one worker, and so do all that read recorded numbers, as the last test asks what was read."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "golden" if reads_golden(self.config.rootpath / path) else path
