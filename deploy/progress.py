"""What the person who started a training sees: a live line in a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Live
from rich.table import Table

from deploy.evaluation import Result, table


class Progress:
    """Progress of a training loop of `total_steps`, of which `done` were made before (a resumed run).

    In a terminal one line is redrawn; otherwise every call prints a line at once, so that logs are up to date.
    """

    def __init__(self, total_steps: int, done: int = 0, console: Console | None = None) -> None:
        self._total, self._done = total_steps, done
        self._console = console or Console()
        self._started: tuple[float, int] | None = None
        self._live: Live | None = None
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
            self._live = Live(*columns, console=self._console, transient=True)
            self._task = self._live.add_task("starting", total=total_steps, completed=done)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def phase(self, text: str) -> None:
        """Says what goes on now, e.g. "starting 2 rollout replicas ..."."""
        if self._live:
            self._live.update(self._task, description=text)
        else:
            self._line(text)

    def detail(self, text: str) -> None:
        """A line for logs; a terminal has no room for it."""
        if not self._live:
            self._line(text)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Step `step` (from 0) is done, with these metrics."""
        self._done = step + 1
        line = (
            f"step {self._done}/{self._total}  reward {_number(metrics.get('reward/mean'), 3)}  "
            f"{_number(metrics.get('rollout/images_per_s'), 1)} images/s  {self._left()} left"
        )
        if self._live:
            self._live.update(self._task, description=line, completed=self._done)
        else:
            self._line(line)

    def summary(self, before: Result | None, after: Result | None, report: Path) -> None:
        """Prints the final table of the held-out results and where the report is."""
        if self._live:
            self._live.stop()
        if before:
            drawn = Table("", "before", *(("after", "difference") if after else ()), title="Held-out results")
            for row in table(before, after):
                drawn.add_row(*map(escape, row if after else row[:2]))  # tags are untrusted text
            self._console.print(drawn)
        self._line(f"report: {report}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def _left(self) -> str:
        """Time left at the pace since the first update, which leaves start-up out; it covers evaluations too."""
        now = time.monotonic()
        if self._started is None:
            self._started = now, self._done
        begin, first = self._started
        if self._done >= self._total:
            return "0:00:00"
        if self._done <= first:
            return "?"
        return str(timedelta(seconds=round((now - begin) / (self._done - first) * (self._total - self._done))))


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
