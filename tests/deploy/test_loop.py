"""What the loop itself decides: which groups an update may use, and when to give up on a learner."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from common.config import ConfigError, TrainConfig
from common.prompts import PromptOrder
from common.recipe import load_config, validate
from common.records import write_groups
from common.rundir import RunDirectory
from common.types import Chain, Group, ImageSegment, Prompt, RolloutRequest, RolloutStats, TextSegment
from deploy.in_flight import InFlight, conditions
from deploy.loop import learn, steps
from deploy.recovery import MAX_TRIES, Recovery, redoing_lost
from deploy.requests import training_requests
from deploy.scoring import tickets
from deploy.step_metrics import Clock
from learner import checkpoint as run_checkpoint
from learner.checkpoint import MANIFEST
from learner.group import LostLearnerError
from rewards.pool import Scored
from rollout.batch import Batch


def batch_of(versions: list[int], follow_up: Any = None) -> Batch:
    """A group of two chains from each version."""
    requests = [RolloutRequest(Prompt(str(i), "p", {}), 5, (0, 1), None, 2) for i in range(len(versions))]
    batch = Batch(requests, follow_up=follow_up)
    for place, version in enumerate(versions):
        batch.finish([place], [f"group {place}"], RolloutStats(version, 2, 0, 0, 0.0, 0.0, 0.0))
    return batch


@pytest.mark.parametrize(("bound", "left_out"), [(0, [0, 1]), (1, [0]), (2, [])])
def test_groups_that_are_too_stale_are_left_out_and_counted(bound: int, left_out: list[int]) -> None:
    scored = Scored(np.ones((3, 2)), {}, {}, 0, 0, 0.0)
    given: list[Any] = []
    started: list[Any] = []

    def start(ref: str, size: int) -> str:
        started.append((ref, size))
        if started == [("group 0", 2)]:
            raise RuntimeError("the scorer has lost its actors")  # heard by whoever waits for the score, not here
        return f"score of {ref}"

    def finish(tickets: list[str]) -> Scored:
        assert tickets == ["score of group 0", "score of group 1", "score of group 2"]
        return scored

    def update(step: int, refs: list[str], rewards: np.ndarray) -> dict[str, float]:
        given.append((step, refs, rewards))
        return {"loss": 1.0}

    session: Any = SimpleNamespace(
        config=SimpleNamespace(
            max_staleness=bound,
            rollout=SimpleNamespace(patience_s=1.0),
            data=SimpleNamespace(refill_rounds=0),
            objective=SimpleNamespace(reward_normalisation="none"),
        ),
        version=5,
        rewards=SimpleNamespace(start=start, finish=finish),
        learner=SimpleNamespace(update=update),
    )
    batch = batch_of([3, 4, 5], follow_up=start)
    assert started == [(f"group {i}", 2) for i in range(3)], "each is scored once it is there"
    _, metrics = learn(session, 5, batch, Clock())
    assert started[3:] == [("group 0", 2)], "and no other is twice"
    ((step, refs, rewards),) = given
    assert (step, refs) == (5, ["group 0", "group 1", "group 2"])
    assert sorted(set(np.nonzero(np.isnan(rewards))[0])) == left_out
    assert metrics == {
        "loss": 1.0,
        "reward/refilled_groups": 0.0,
        "rollout/staleness": 1.0,
        "rollout/stale_groups": len(left_out),
    }


def test_groups_that_a_checkpoint_kept_are_not_asked_for_again(tmp_path: Path) -> None:
    config = load_config(
        "shapes", ["max_staleness=2", "steps=9", "data.prompts_per_step=3", "data.group_size=2", "learner.ranks=1"]
    )
    run, order = RunDirectory(tmp_path), PromptOrder([Prompt(str(i), f"p {i}", {}) for i in range(40)], 3, 0)
    asked: list[Any] = []
    scored: list[Any] = []

    def submit(requests: list[RolloutRequest], kept: dict[int, Any], score: Any) -> Batch:
        batch = Batch(requests, follow_up=score)
        for place, (ref, stats) in kept.items():
            batch.finish([place], [ref], stats)
        asked.append(
            (requests[0].step, {place: (ref, stats.version, stats.tokens) for place, (ref, stats) in kept.items()})
        )
        return batch

    learner = SimpleNamespace(restore=lambda path, count: [f"{path.stem} {i}" for i in range(count)])

    def begin(config: TrainConfig, first: int) -> InFlight:
        asked.clear()
        rollout, rewards = SimpleNamespace(submit=submit), SimpleNamespace(start=lambda ref, size: scored.append(ref))
        session: Any = SimpleNamespace(config=config, run=run, order=order, rollout=rollout, rewards=rewards)
        session.learner = learner
        return InFlight(session, first)

    calm = begin(config, 0)
    assert calm.take(0).requests == training_requests(config, order, 0)
    assert calm.take(1).requests == training_requests(config, order, 1)
    assert asked == [(step, {}) for step in range(4)] and calm.finished() == {}

    # Step 3 has finished all but its first group when step 2 is done.
    made = [made_group(request, 1) for request in training_requests(config, order, 3)[1:]]
    state = {"conditions": conditions(config)}
    write_in_flight(run.checkpoint(2), 3, made, state)
    gone_on = begin(config, 2)
    gone_on.take(2)
    assert asked == [(2, {}), (3, {1: ("step-000003 0", 1, 4), 2: ("step-000003 1", 1, 4)}), (4, {})]
    assert gone_on.finished() == {3: ["step-000003 0", "step-000003 1"]} and scored == gone_on.finished()[3]

    warmer = config.model_copy(update={"sampling": config.sampling.model_copy(update={"temperature": 0.5})})
    begin(warmer, 2).take(2)
    assert asked == [(step, {}) for step in (2, 3, 4)]
    begin(config.model_copy(update={"seed": 1}), 2).take(2)
    assert asked == [(step, {}) for step in (2, 3, 4)]


def made_group(request: RolloutRequest, version: int) -> Group:
    """A group of one pixel and two tokens a chain."""
    none = np.zeros((0, 1, 1), np.float32)
    text = TextSegment(np.array([1]), np.array([2, 3]), np.zeros(2, np.float32), True, "", version)
    pixel = np.zeros((1, 1, 3), np.uint8)
    image = ImageSegment(none, none, none, none[:, 0, 0], none[:, 0, 0], pixel, (1, 1), version)
    return Group(request.prompt, request.step, tuple(Chain((text, image), seed) for seed in request.seeds))


def write_in_flight(checkpoint: Path, step: int, groups: list[Group], state: dict[str, Any]) -> None:
    nothing = np.zeros((len(groups), len(groups[0].chains)))
    write_groups(run_checkpoint.in_flight_file(checkpoint, step), groups, nothing, {}, nothing, latents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))


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
    for step in range(3 * MAX_TRIES):
        assert recovery.after(LostLearnerError("rank 1 died")) == 4
        recovery.stepped(step)
    for _ in range(MAX_TRIES):
        recovery.after(LostLearnerError("rank 1 died"))
        recovery.stepped(4)  # which was done before
    with pytest.raises(LostLearnerError, match="rank 2 died"):
        recovery.after(LostLearnerError("rank 2 died"))


def test_a_learner_that_is_lost_with_all_checkpoints_damaged_does_not_begin_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 0})
    run.checkpoint(1).mkdir(parents=True)
    (run.checkpoint(1) / MANIFEST).write_text('{"state.json": "0"}')
    session: Any = SimpleNamespace(
        run=run, config=load_config("shapes"), rollout=SimpleNamespace(cancel=lambda: None), progress=None
    )
    with pytest.raises(ConfigError, match=r"none of the checkpoints in .* is whole; restore one"):
        Recovery(session).after(LostLearnerError("rank 1 died"))
    assert len(run.read_metrics()) == 1


@pytest.mark.parametrize(
    ("every", "first", "there", "made_up"),
    [(0, 0, [], [0]), (5, 0, [0], []), (5, 10, [0, 5], [10]), (5, 10, [10], []), (5, 7, [5], []), (0, 10, [0], [])],
)
def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, first: int, there: list[int], made_up: list[int]
) -> None:
    run, evaluated = RunDirectory(tmp_path), list[int]()
    for step in there:
        run.write_json(run.evaluation_file(step), {})

    def begin(session: Any, step: int) -> None:
        raise InterruptedError("enough")

    monkeypatch.setattr("deploy.loop.evaluate", lambda session, step, required: evaluated.append(step))
    monkeypatch.setattr("deploy.loop.InFlight", begin)
    session: Any = SimpleNamespace(
        config=load_config("shapes", [f"evaluation.every={every}"]),
        run=run,
        rollout=SimpleNamespace(sync=lambda weights: 0.0),
        learner=SimpleNamespace(publish=lambda: None),
    )
    with pytest.raises(InterruptedError):
        next(steps(session, first, 0.0))
    assert evaluated == made_up


def test_a_group_may_be_made_again_after_a_call_that_hung_to_its_deadline() -> None:
    config = validate({"rollout": {"deadline_s": 0.2}})
    batch = Batch(batch_of([0]).requests)
    stats = RolloutStats(0, 2, 0, 0, 0.0, 0.0, 0.0)
    threading.Timer(0.5, lambda: batch.finish([0], ["made again"], stats)).start()  # type: ignore[list-item]
    rewards = SimpleNamespace(start=lambda ref, size: (ref, size))
    assert tickets(SimpleNamespace(config=config, rewards=rewards), batch) == [("made again", 2)]  # type: ignore[arg-type, comparison-overlap]
