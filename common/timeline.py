"""Who did what when: spans of the last step, as the trace that chrome://tracing and ui.perfetto.dev show.

Every process keeps its own last spans; the driver gathers them for a step on request (deploy/timeline.py). Times are
each machine's own clock, so spans of two machines are as far off as their clocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_spans: deque[Span] = deque(maxlen=100_000)


@dataclass(frozen=True)
class Span:
    """Something that `track` (an actor, the driver) did: from `started` (Unix time) for `seconds`."""

    track: str
    name: str
    started: float
    seconds: float


def span(track: str, name: str, started: float, seconds: float) -> None:
    """Keeps a span of this process."""
    _spans.append(Span(track, name, started, seconds))


@contextmanager
def timed(track: str, name: str) -> Iterator[None]:
    """Keeps what goes on inside as a span."""
    started, before = time.time(), time.monotonic()
    yield
    span(track, name, started, time.monotonic() - before)


def take_spans() -> list[Span]:
    """The spans of this process since the last call, which forgets them."""
    return [_spans.popleft() for _ in range(len(_spans))]


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """Trace events with a row for each track, in microseconds since the first span."""
    spans = sorted(spans, key=lambda s: s.started)
    tracks = {track: i for i, track in enumerate(sorted({s.track for s in spans}, key=_order))}
    origin = spans[0].started if spans else 0.0
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": track}} for track, i in tracks.items()
    ]
    order = [
        {"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": i, "args": {"sort_index": i}} for i in tracks.values()
    ]
    done = [
        {
            "ph": "X",
            "name": s.name,
            "pid": 0,
            "tid": tracks[s.track],
            "ts": round(1e6 * (s.started - origin)),
            "dur": round(1e6 * s.seconds),
        }
        for s in spans
    ]
    return {"displayTimeUnit": "ms", "traceEvents": names + order + done}


def _order(track: str) -> tuple[bool, str, int]:
    """The driver first, then by name and number: rollout-2 before rollout-10."""
    name, _, number = track.rpartition("-")
    return (track != "driver", name or track, int(number) if number.isdecimal() else -1)
