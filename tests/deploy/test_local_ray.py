"""Ray on this machine when it does not come up at the first try; that it does at all, every run shows."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import ray
from ray._private import node

from common.config import ConfigError
from deploy.local_ray import TRIES, start_ray

LATE = Exception("The current node timed out during startup. This ")


def calls_of(monkeypatch: pytest.MonkeyPatch, *outcomes: Exception | None) -> list[dict[str, Any]]:
    """The options of every `ray.init`, which ends as told."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if error := outcomes[len(calls) - 1]:
            raise error

    monkeypatch.setattr(ray, "init", init)
    return calls


def test_ray_says_so() -> None:
    assert str(LATE) in inspect.getsource(node)


def test_a_busy_machine_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, LATE, LATE, None)
    start_ray(3, object_store_memory=1 << 20)
    assert len(calls) == TRIES and calls[0] == calls[-1]
    assert calls[0]["address"] == "local" and calls[0]["num_cpus"] == 3 and calls[0]["object_store_memory"] == 1 << 20


def test_a_machine_that_stays_busy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls_of(monkeypatch, *[LATE] * TRIES)
    with pytest.raises(ConfigError, match=r"did not come up .* 3 times; end programs"):
        start_ray(1)


def test_other_errors_are_raised_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        start_ray(1)
    assert len(calls) == 1
