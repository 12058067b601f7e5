"""Spans become a Chrome trace in which every track is a row."""

from __future__ import annotations

import time

import pytest

from common.timeline import Span, chrome_trace, span, take_spans, timed


def test_spans_are_taken_once() -> None:
    take_spans()
    before = time.time()
    with timed("driver", "update"):
        time.sleep(0.01)
    span("rollout-0", "drawing", 5.0, 2.0)
    first, second = take_spans()
    assert (first.track, first.name) == ("driver", "update") and first.seconds >= 0.01
    assert before <= first.started <= time.time()
    assert second == Span("rollout-0", "drawing", 5.0, 2.0)
    assert take_spans() == []


def test_a_phase_that_fails_leaves_no_span() -> None:
    with pytest.raises(ZeroDivisionError), timed("driver", "update"):
        _ = 1 / 0
    assert take_spans() == []


def test_a_trace_has_a_row_per_track_and_counts_from_its_first_span() -> None:
    spans = [
        Span("rollout-10", "reasoning", 1000.5, 0.25),
        Span("rollout-2", "drawing", 1000.25, 1.0),
        Span("driver", "rollout", 1000.0, 2.0),
    ]
    events = chrome_trace(spans)["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert rows == {0: "driver", 1: "rollout-2", 2: "rollout-10"}
    done = [(rows[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert done == [
        ("driver", "rollout", 0, 2_000_000),
        ("rollout-2", "drawing", 250_000, 1_000_000),
        ("rollout-10", "reasoning", 500_000, 250_000),
    ]
    assert chrome_trace([])["traceEvents"] == []
