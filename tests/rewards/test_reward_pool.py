"""The pool on a real Ray: what it returns, and what survives faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from common.config import ConfigError, Reward
from common.shapes.scene import Item, Scene, render
from common.types import Chain, Group, ImageSegment, NonFiniteError, Prompt
from rewards.pool import RewardPool, Scored, Ticket

FAULTY = "tests.rewards.faulty_scorers:Faulty"
FIRST_BYTE = "tests.rewards.faulty_scorers:FirstByte"
G = 3
METADATA: dict[str, Any] = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}

Start = Callable[..., RewardPool]


def _group(images: list[np.ndarray], **metadata: Any) -> ray.ObjectRef[Group]:
    none = np.zeros((0, 1, 1), np.float32)
    segments = [ImageSegment(none, none, none, none[:, 0, 0], none[:, 0, 0], image, (1, 1), 0) for image in images]
    chains = tuple(Chain((segment,), seed) for seed, segment in enumerate(segments))
    return ray.put(Group(Prompt("p", "a red circle", METADATA | metadata), 0, chains))


def _flat(first: int, **metadata: Any) -> ray.ObjectRef[Group]:
    """A group of plain images whose first bytes are first, first + 1, ..."""
    return _group([np.full((32, 32, 3), first + index, np.uint8) for index in range(G)], **metadata)


@pytest.fixture
def start(local_ray: None) -> Iterator[Start]:
    """Starts pools of cheap actors, and ends them."""
    pools: list[RewardPool] = []

    def start(*scorers: dict[str, Any], **settings: Any) -> RewardPool:
        for pool in pools:
            pool.close()
        pools.append(RewardPool(tuple(Reward(**{"cpus": 0.1, **scorer}) for scorer in scorers), **settings))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def _rows(*firsts: float) -> np.ndarray:
    """What the flat groups of these first bytes score, [B, G]."""
    return np.array(firsts, np.float64)[:, None] + np.arange(G)


def _score(pool: RewardPool, groups: list[ray.ObjectRef], sizes: list[int]) -> Scored:
    return pool.finish([pool.start(group, size) for group, size in zip(groups, sizes, strict=True)])


def test_weighted_sum_of_two_rewards(start: Start) -> None:
    pool = start({"name": "shapes", "weight": 2.0}, {"name": FIRST_BYTE, "weight": -0.5})
    image = render(Scene((Item("red", "circle", "top left"),)), np.random.default_rng(0))
    scored = _score(pool, [_group([image] * G), _flat(10)], [G, G])
    assert scored.total.dtype == np.float64
    np.testing.assert_array_equal(scored.by_scorer["shapes"], [[1] * G, [0] * G])
    np.testing.assert_array_equal(scored.components["shapes/strict"], [[1] * G, [0] * G])
    np.testing.assert_array_equal(scored.by_scorer[FIRST_BYTE], [[image[0, 0, 0]] * G, [10, 11, 12]])
    np.testing.assert_array_equal(scored.total, 2 * scored.by_scorer["shapes"] - 0.5 * scored.by_scorer[FIRST_BYTE])
    assert scored.errors == 0
    assert scored.seconds > 0


def test_a_killed_actor_costs_nothing_but_time(start: Start) -> None:
    pool = start({"name": FIRST_BYTE, "replicas": 2})
    firsts = list(range(0, 60, 10))
    tickets = [pool.start(_flat(first, sleep=0.5), G) for first in firsts]
    time.sleep(0.7)
    ray.kill(ray.get_actor(f"reward-{FIRST_BYTE}-0"), no_restart=False)
    scored = pool.finish(tickets)
    np.testing.assert_array_equal(scored.total, _rows(*firsts))
    assert scored.errors == 0
    assert len(np.unique(scored.components[f"{FIRST_BYTE}/pid"])) >= 2


def test_faults_mask_their_own_group_only(start: Start, tmp_path: Path) -> None:
    pool = start({"name": FAULTY, "replicas": 2, "retries": 1, "deadline_s": 5}, {"name": "shapes"})
    mark = str(tmp_path / "died")
    faults: list[dict[str, Any]] = [
        {},
        {"do": "raise"},
        {"do": "hang"},
        {"do": "misshapen"},
        {"do": "skip"},
        {"do": "die", "mark": mark},
        {},
    ]
    scored = _score(pool, [_flat(10 * i, **fault) for i, fault in enumerate(faults)], [G] * len(faults))
    expected = _rows(*range(0, 70, 10))
    expected[1:4] = np.nan
    expected[4, 1] = np.nan
    np.testing.assert_array_equal(scored.by_scorer[FAULTY], expected)
    np.testing.assert_array_equal(scored.total, expected + scored.by_scorer["shapes"])
    assert not np.isnan(scored.by_scorer["shapes"]).any()
    assert scored.errors == 3 * G + 1
    assert Path(mark).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_stop_or_are_left_out(start: Start, value: float) -> None:
    groups = [_flat(0, do="value", value=value), _flat(10)]
    with pytest.raises(NonFiniteError, match=f"reward {FAULTY}: 1 scores are NaN or infinite"):
        _score(start({"name": FAULTY}), groups, [G, G])
    scored = _score(start({"name": FAULTY}, on_nonfinite="skip"), groups, [G, G])
    np.testing.assert_array_equal(scored.total, [[np.nan, 1, 2], [10, 11, 12]])
    assert scored.nonfinite == scored.errors == 1


def test_a_scorer_that_always_fails_ends_the_run(start: Start) -> None:
    """One good group begins the count anew; a run of steps without scores would learn nothing to its end."""
    beside = {"name": FAULTY.replace("Faulty", "FaultyToo"), "retries": 0, "weight": 0.0}  # recorded only
    pool = start({"name": FAULTY, "retries": 0}, beside)
    for do in ("raise", "raise", "", "raise", "raise"):
        _score(pool, [_flat(0, do="raise"), _flat(0, do=do)], [G, G])
    with pytest.raises(RuntimeError, match=f"reward {FAULTY} failed at every group, 3 times .*asked to raise"):
        _score(pool, [_flat(0, do="raise")], [G])


def test_a_single_replica_serves_on_after_a_hang(start: Start) -> None:
    pool = start({"name": FAULTY, "retries": 0, "deadline_s": 1.0, "weight": 0.0})
    scored = _score(pool, [_flat(0, do="hang"), _flat(10)], [G, G])
    np.testing.assert_array_equal(scored.by_scorer[FAULTY], [[np.nan] * G, [10, 11, 12]])
    np.testing.assert_array_equal(scored.total, np.zeros((2, G)))
    assert scored.errors == G


def test_close_gives_up_what_is_unfinished_and_frees_the_names(start: Start) -> None:
    pool = start({"name": FAULTY})
    tickets = [pool.start(_flat(0, do="hang"), G), pool.start(_flat(0), G)]
    time.sleep(0.3)
    pool.close()
    assert all(future.cancelled() for ticket in tickets for future in ticket.outcomes)
    np.testing.assert_array_equal(_score(start({"name": FAULTY}), [_flat(5)], [G]).total, _rows(5))


def test_what_cannot_start_says_why(start: Start) -> None:
    with pytest.raises(ConfigError, match="did you mean shapes"):
        start({"name": "shape"})
    with pytest.raises(ConfigError, match=r"cannot be built: on node 127\.0\.0\.1 .*: no weights at /nowhere"):
        start({"name": "tests.rewards.faulty_scorers:Unbuildable"})


@pytest.fixture
def builds_at_times(start: Start, tmp_path: Path) -> Callable[..., tuple[RewardPool, list[Ticket]]]:
    """A pool of one actor that is lost over the first of two groups, and their tickets; failing: its later builds."""

    def begin(*failing: int) -> tuple[RewardPool, list[Ticket]]:
        (tmp_path / "builds").mkdir()
        options = {"builds": str(tmp_path / "builds"), "failing": failing}
        pool = start({"name": "tests.rewards.faulty_scorers:BuildsAtTimes", "options": options})
        return pool, [pool.start(_flat(0, do="die", mark=str(tmp_path / "died")), G), pool.start(_flat(10), G)]

    return begin


def test_an_actor_that_cannot_be_built_for_a_moment_is_replaced(
    builds_at_times: Callable[..., tuple[RewardPool, list[Ticket]]],
) -> None:
    pool, tickets = builds_at_times(1, 2)
    np.testing.assert_array_equal(pool.finish(tickets).total, _rows(0, 10))


def test_a_reward_without_actors_ends_the_run(
    builds_at_times: Callable[..., tuple[RewardPool, list[Ticket]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, tickets = builds_at_times(*range(1, 100))
    monkeypatch.setattr("rewards.replicas.START_TIMEOUT_S", 3.0)
    with pytest.raises(RuntimeError, match="no actor left; the last one: OSError: the disk is away"):
        pool.finish(tickets)
    with pytest.raises(RuntimeError, match="no actor left"):
        pool.start(_flat(0), G)


def test_scores_that_do_not_come_are_not_waited_for_without_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = start({"name": FIRST_BYTE})
    done = pool.start(_flat(0), G)
    monkeypatch.setattr("rewards.replicas.Replicas.patience_s", 1.0)
    with pytest.raises(RuntimeError, match=r"no group was scored for 1 s .*; 1 of 2 are missing"):
        pool.finish([done, pool.start(_flat(1, sleep=30), G)])


def test_actors_without_room_are_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.replicas.START_TIMEOUT_S", 1.0)
    roomless = rf"no room: reward-{FAULTY}-0, {{}} CPU each, waited 1 s\. The cluster has 2 CPU.* add nodes"
    with pytest.raises(ConfigError, match=roomless.format(64)):
        start({"name": FAULTY, "cpus": 64})
    monkeypatch.undo()
    pool = start({"name": FAULTY})
    monkeypatch.setattr("rewards.replicas.START_TIMEOUT_S", 1.0)
    pool._replicas[0]._rooms[0].give_back()
    with pytest.raises(ConfigError, match=roomless.format(0.1)):
        _score(pool, [_flat(0)], [G])


def test_sizes_must_be_right(start: Start) -> None:
    pool = start({"name": FIRST_BYTE})
    with pytest.raises(ValueError, match="correct size"):
        _score(pool, [_flat(0)], [G + 1])
    with pytest.raises(ValueError, match="at least one"):
        pool.finish([])
