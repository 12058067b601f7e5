"""Dynamic sampling: flat groups are replaced by other prompts with other seeds, a bounded number of times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from common.config import TrainConfig
from common.prompts import PromptOrder
from common.recipe import validate
from common.types import Prompt, RolloutRequest, RolloutStats
from deploy.refill import flat_groups, refill, training_rewards
from deploy.requests import training_requests
from rewards.pool import Scored
from rollout.batch import Batch

PROMPTS = [Prompt(str(i), f"prompt {i}", {}) for i in range(7)]


def finished(requests: list[RolloutRequest], version: int) -> Batch:
    batch = Batch(requests)
    stats = RolloutStats(
        version, chains=2 * len(requests), tokens=9, truncated=0, reasoning_s=1.0, drawing_s=1.0, started=0.0
    )
    batch.finish(list(range(len(requests))), list(requests), stats)  # type: ignore[arg-type]
    return batch


class FakeActors:
    """Replicas whose groups are their requests, and a scorer that likes prompts in turn; neither needs an actor."""

    def __init__(self, flat: set[str]) -> None:
        self.flat, self.submitted = flat, []  # type: ignore[var-annotated]

    def submit(self, requests: list[RolloutRequest], first: bool) -> Batch:
        assert first, "what later steps have queued must not be waited for"
        self.submitted.append(requests)
        return finished(requests, version=3)

    def start(self, group: RolloutRequest, size: int) -> RolloutRequest:
        return group

    def finish(self, groups: list[RolloutRequest]) -> Scored:
        total = np.array([[0.5, 0.5 if group.prompt.id in self.flat else 1.0] for group in groups])
        return Scored(total, {"fake": total.astype(np.float32)}, {}, 1, 0, 1.0)


def run(
    rounds: int, flat: set[str], prompts: list[Prompt] = PROMPTS
) -> tuple[Any, Batch, FakeActors, tuple[Scored, int]]:
    config: TrainConfig = validate({"data": {"prompts_per_step": 4, "group_size": 2, "refill_rounds": rounds}})
    actors, order = FakeActors(flat), PromptOrder(prompts, 4, 0)
    session: Any = SimpleNamespace(config=config, order=order, rollout=actors, rewards=actors)
    batch = finished(training_requests(config, order, 0), version=2)
    return session, batch, actors, refill(session, 0, batch, actors.finish(batch.requests))


def test_flat_groups_are_those_of_equal_scores() -> None:
    nan = np.nan
    rewards = np.array([[0.1, 0.1, 0.1], [0.1, 0.2, 0.1], [nan, 0.3, 0.3], [nan, nan, nan], [nan, nan, 0.2]])
    assert flat_groups(rewards) == [0, 2, 4]


def test_rewards_that_cancel_in_the_sum_are_no_flat_group_once_each_is_normalised() -> None:
    rewards = [{"name": "a", "weight": 1.0}, {"name": "b", "weight": 0.5}, {"name": "seen", "weight": 0.0}]
    first = np.array([[1.0, 2.0, 3.0, np.nan]])
    scored = Scored(first * 0, {"a": first, "b": -2 * first**0 - 2 * first, "seen": first}, {}, 1, 0, 1.0)
    summed, apart = (
        training_rewards(validate({"rewards": rewards, "objective": {"reward_normalisation": how}}), scored)
        for how in ("none", "group")
    )
    assert summed is scored.total and flat_groups(summed) == [0]
    assert flat_groups(apart) == []
    np.testing.assert_allclose(apart[0, :3], [-0.61, 0, 0.61], atol=0.01)
    assert np.isnan(apart[0, 3])


def test_off_by_default_and_nothing_to_do() -> None:
    for rounds, flat in ((0, {prompt.id for prompt in PROMPTS}), (3, set())):
        _, _, actors, (scored, replaced) = run(rounds, flat)
        assert actors.submitted == []
        assert replaced == 0
        assert scored.total.shape == (4, 2)


def test_flat_groups_make_way_for_other_prompts() -> None:
    order = PromptOrder(PROMPTS, 4, 0)
    mine = [prompt.id for prompt in order.batch(0)]
    flat = set(mine[1:3])
    _, batch, actors, (scored, replaced) = run(3, flat)
    assert replaced == 2
    assert len(actors.submitted) == 1
    assert flat_groups(scored.total) == []
    ids = [request.prompt.id for request in batch.requests]
    assert (ids[0], ids[3]) == (mine[0], mine[3]), "the others stay where they are"
    assert not {ids[1], ids[2]} & set(mine)
    assert batch.refs == batch.requests, "groups follow their requests"
    assert batch.versions == [2, 3, 3, 2]
    seeds = [seed for request in [*batch.requests, *training_requests(run(0, set())[0].config, order, 0)[1:3]]
             for seed in request.seeds]  # fmt: skip
    assert len(set(seeds)) == len(seeds)
    assert scored.errors == 2


def test_rounds_are_bounded_and_what_stays_flat_is_kept() -> None:
    prompts = [Prompt(str(i), f"prompt {i}", {}) for i in range(13)]
    everything = {prompt.id for prompt in prompts}
    _, _, actors, (_, replaced) = run(2, everything, prompts)
    assert [len(requests) for requests in actors.submitted] == [4, 4] and replaced == 8
    _, batch, actors, (scored, replaced) = run(4, everything, prompts)
    # Of thirteen prompts nine are not in the step, and none is tried twice.
    assert [len(requests) for requests in actors.submitted] == [4, 4, 1] and replaced == 9
    assert len({request.prompt.id for requests in actors.submitted for request in requests}) == 9
    assert flat_groups(scored.total) == [0, 1, 2, 3]
    assert len(batch.refs) == 4
    again = run(4, everything, prompts)[1]
    assert again.requests == batch.requests, "a resumed or repeated step draws the same"
