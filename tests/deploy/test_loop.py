"""What the loop itself decides: which groups an update may use, and when to give up on a learner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from common.types import Prompt, RolloutRequest, RolloutStats
from deploy.loop import Clock, learn
from deploy.recovery import MAX_TRIES, Recovery, redoing_lost
from learner.group import LostLearnerError
from rewards.pool import Scored
from rollout.batch import Batch


def batch_of(versions: list[int]) -> Batch:
    """A group of two chains from each version."""
    batch = Batch([RolloutRequest(Prompt(str(i), "p", {}), 5, (0, 1), None, 2) for i in range(len(versions))])
    for place, version in enumerate(versions):
        batch.finish([place], [f"group {place}"], RolloutStats(version, 2, 0, 0.0, 0.0, 0.0))
    return batch


@pytest.mark.parametrize(("bound", "left_out"), [(0, [0, 1]), (1, [0]), (2, [])])
def test_groups_that_are_too_stale_are_left_out_and_counted(bound: int, left_out: list[int]) -> None:
    scored = Scored(np.ones((3, 2)), {}, {}, 0, 0, 0.0)
    given: list[Any] = []

    def update(step: int, refs: list[str], rewards: np.ndarray) -> dict[str, float]:
        given.append((step, refs, rewards))
        return {"loss": 1.0}

    session: Any = SimpleNamespace(
        config=SimpleNamespace(
            max_staleness=bound, rollout=SimpleNamespace(deadline_s=1.0), data=SimpleNamespace(refill_rounds=0)
        ),
        version=5,
        rewards=SimpleNamespace(start=lambda ref, size: ref, finish=lambda tickets: scored),
        learner=SimpleNamespace(update=update),
    )
    _, metrics = learn(session, 5, batch_of([3, 4, 5]), Clock())
    ((step, refs, rewards),) = given
    assert (step, refs) == (5, ["group 0", "group 1", "group 2"])
    assert sorted(set(np.nonzero(np.isnan(rewards))[0])) == left_out
    assert metrics == {
        "loss": 1.0,
        "reward/refilled_groups": 0.0,
        "rollout/staleness": 1.0,
        "rollout/stale_groups": len(left_out),
    }


def test_lost_groups_are_asked_for_again_but_not_for_ever() -> None:
    asked: list[Batch] = []
    session: Any = SimpleNamespace(rollout=SimpleNamespace(redo=asked.append))
    batch = batch_of([0])

    def read() -> str:
        if len(asked) < 2:
            raise ObjectLostError("00" * 28, None, "")
        return "read"

    assert redoing_lost(session, batch, read) == "read"
    assert asked == [batch, batch]

    def never() -> str:
        raise ObjectLostError("00" * 28, None, "")

    with pytest.raises(ObjectLostError):
        redoing_lost(session, batch, never)


def test_a_learner_that_is_lost_again_and_again_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = Recovery(SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(recovery, "_back", lambda: 4)
    for _ in range(3 * MAX_TRIES):
        assert recovery.after(LostLearnerError("rank 1 died")) == 4
        recovery.stepped()
    for _ in range(MAX_TRIES):
        recovery.after(LostLearnerError("rank 1 died"))
    with pytest.raises(LostLearnerError, match="rank 2 died"):
        recovery.after(LostLearnerError("rank 2 died"))
