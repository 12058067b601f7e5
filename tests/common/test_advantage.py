"""Advantages against flow_grpo's, and who is left out."""

from __future__ import annotations

import numpy as np
import pytest
from golden_numbers import close, golden, meaning, named

from common.advantage import decoupled_rewards, group_advantages

RECORDED = "flowgrpo/advantages.npz"
CASES = named(RECORDED, "(.+)_group")


def by_group(case: str, name: str) -> np.ndarray:
    """A recorded column as [groups, largest group], NaN where a group has fewer members."""
    numbers = golden(RECORDED)
    group, column = numbers[f"{case}_group"], numbers[f"{case}_{name}"]
    rows = [column[group == g] for g in np.unique(group)]
    return np.array([[*row, *[np.nan] * (max(map(len, rows)) - len(row))] for row in rows])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("std", ["group", "global"])
def test_recorded_advantages(case: str, std: str) -> None:
    rewards, wanted = by_group(case, "reward"), by_group(case, f"adv_{std}std")
    found = group_advantages(rewards, std=std)
    close(found.values, np.nan_to_num(wanted), atol=1e-12, rtol=1e-9)
    flat = np.array([np.unique(row[~np.isnan(row)]).size == 1 for row in rewards])
    assert (found.mask == (~np.isnan(rewards) & ~flat[:, None])).all()
    assert found.zero_variance_groups == flat.sum()


@pytest.mark.parametrize("case", named(RECORDED, "(.+)_adv_unirl"))
def test_the_convention_of_unirl_differs_in_the_deviation_alone(case: str) -> None:
    """UniRL divides by the sample deviation + 1e-8, flow_grpo and we by the population's + 1e-4."""
    rewards, theirs = by_group(case, "reward"), by_group(case, "adv_unirl")
    found = group_advantages(rewards, std="none")
    sample = np.nanstd(rewards, 1, ddof=1, keepdims=True) + 1e-8
    close(np.where(found.mask, found.values / sample, 0.0), np.nan_to_num(theirs), atol=1e-5)


def test_recorded_column_and_history() -> None:
    """One score per row; and a second batch of a prompt, normalised together with the first."""
    numbers = golden(RECORDED)
    members = meaning(RECORDED, "column_reward").split("groups ")[1].split(" (")[0].split()
    column = numbers["column_reward"].reshape(len(set(members)), -1)
    close(group_advantages(column).values.reshape(-1, 1), numbers["column_adv"], atol=1e-6)
    first, second = numbers["history_reward1"], numbers["history_reward2"]
    both = group_advantages(np.concatenate([first, second])[None]).values[0]
    close(both[len(first) :], numbers["history_adv2"], atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_without_division(case: str) -> None:
    rewards = by_group(case, "reward")
    wanted = np.nan_to_num(rewards - np.nanmean(rewards, 1, keepdims=True))
    close(group_advantages(rewards, std="none").values, wanted, atol=1e-12)


@pytest.mark.parametrize("score", [0.1, 0.3, 1 / 3, 0.7, 1e-9, 12345.678, 0.0])
@pytest.mark.parametrize("count", [3, 6, 7, 24])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_equal_scores_are_masked_whatever_their_mean_rounds_to(score: float, count: int, missing: int) -> None:
    rewards = np.full((2, count), score)
    rewards[0, :missing] = np.nan
    rewards[1, 0] += 1
    for std in ("group", "global", "none"):
        found = group_advantages(rewards, std=std)
        assert not found.mask[0].any()
        assert (found.values[0] == 0).all()
        assert found.zero_variance_groups == 1
        assert found.mask[1].all()


def test_unscored_chains_are_masked_and_leave_no_trace_in_the_others() -> None:
    """A chain without a score is not a chain that scored 0."""
    rewards = np.array(
        [[0.2, np.nan, 0.9, 0.4], [0.2, 0.9, np.inf, -np.inf], [np.nan] * 4, [np.nan, 0.5, np.nan, np.nan]]
    )
    found = group_advantages(rewards)
    close(found.values[0, [0, 2, 3]], group_advantages(rewards[:1, [0, 2, 3]]).values[0], atol=1e-12)
    close(found.values[1, :2], group_advantages(rewards[1:2, :2]).values[0], atol=1e-12)
    assert found.mask.tolist() == [[True, False, True, True], [True, True, False, False], [False] * 4, [False] * 4]
    assert np.isfinite(found.values).all()
    assert (found.values[~found.mask] == 0).all()
    assert found.unscored_chains == 1 + 2 + 4 + 3
    assert found.zero_variance_groups == 1, "one chain alone"


def test_global_deviation_counts_scored_chains_only() -> None:
    rewards = np.array([[0.0, 1.0, np.nan], [0.2, 0.2, 0.2]])
    found = group_advantages(rewards, std="global")
    scale = np.std([0.0, 1.0, 0.2, 0.2, 0.2]) + 1e-4
    close(found.values[0], np.array([-0.5 / scale, 0.5 / scale, 0.0]), atol=1e-12)


def test_advantages_are_clipped() -> None:
    rewards = np.zeros((1, 64))
    rewards[0, 5] = 1.0
    free, bound = group_advantages(rewards, clip=100.0), group_advantages(rewards)
    assert free.values[0, 5] > 7
    assert bound.values[0, 5] == 5.0
    assert (bound.values[0, :5] == free.values[0, :5]).all()
    assert group_advantages(-rewards).values[0, 5] == -5.0


def test_nobody_scored() -> None:
    for std in ("group", "global", "none"):
        found = group_advantages(np.full((2, 3), np.nan), std=std)
        assert not found.mask.any()
        assert (found.values == 0).all()
        assert (found.zero_variance_groups, found.unscored_chains) == (0, 6)


def test_decoupled_rewards_are_each_normalised_within_their_group() -> None:
    """GDPO by hand: z-scores over the chains that every reward judged, weighted, then divided by the batch's deviation;
    a range of thousands counts no more than one of tenths, and a reward that is flat in a group adds nothing to it."""
    rng = np.random.default_rng(0)
    small, large = rng.random((3, 5)), 1e4 * rng.random((3, 5))
    large[1] = 777.0
    small[2, 4] = np.nan
    total = small - 0.5 * large
    found = decoupled_rewards(total, {"small": small, "large": large, "unused": large}, {"small": 1.0, "large": -0.5})

    def z(row: np.ndarray) -> np.ndarray:
        return (row - row.mean()) / (row.std() + 1e-4)

    close(found[0], z(small[0]) - 0.5 * z(large[0]), atol=1e-12)
    close(found[1], z(small[1]), atol=1e-12)
    close(found[2, :4], z(small[2, :4]) - 0.5 * z(large[2, :4]), atol=1e-12)
    assert np.isnan(found[2, 4])
    contributing = found[np.isfinite(found)]
    close(group_advantages(found, std="global").values[0], found[0] / (contributing.std() + 1e-4), atol=1e-9)


def test_decoupling_one_reward_is_ordinary_grpo() -> None:
    rewards = np.random.default_rng(1).random((4, 6))
    found = group_advantages(decoupled_rewards(2 * rewards, {"a": rewards}, {"a": 2.0}), std="none")
    close(found.values, 2 * group_advantages(rewards).values, atol=1e-12)
