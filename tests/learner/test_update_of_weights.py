"""Which weights an update moves, and where to; what teaches nothing, or is not finite, moves none."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from chains import changed, micro_batch, snapshot, train_config
from golden_numbers import CHECKPOINT
from watched import (
    ADVANTAGES,
    COUNT,
    Watched,
    minibatches_of,
    reinforce,
    same_gradients,
)

from common import flow
from common.advantage import group_advantages
from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.types import Chain
from learner.engine import Engine
from learner.update import metrics_of

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("rewards", [[[0.1] * 3, [0.7] * 3], [[math.nan] * 3, [math.nan, 0.5, math.nan]]])
def test_a_step_without_contributing_chains_changes_nothing(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy, rewards: list[list[float]]
) -> None:
    updater = Watched(policy, train_config(epochs=2, minibatches=1), reference=True, lr=1e-2)
    before = snapshot(policy)
    sums = updater.run(*minibatches_of(golden_checkpoint, chains, np.array(rewards)))
    assert sums == {}
    assert changed(policy, before) == set()
    assert updater.engine.steps == 0
    metrics = metrics_of(sums)
    assert metrics["text/ratio_mean"] == metrics["image/ratio_mean"] == 1.0
    assert metrics["loss/nonfinite"] == 0


def test_flat_groups_and_unscored_chains_leave_no_trace(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """The gradient is that of the two scored chains of the one group with variance, and the mean is over them."""
    rewards = np.array([[0.3, math.nan, 0.9], [0.4, 0.4, 0.4]])
    wanted = reinforce(
        policy, golden_checkpoint, [chains[0], chains[2]], group_advantages(rewards).values[0, [0, 2]].tolist()
    )
    updater = Watched(policy, train_config(regulariser="none"), lr=0.0)
    batches, total = minibatches_of(golden_checkpoint, chains, rewards)
    assert total == [2]
    sums = updater.run(batches, total)
    assert sums["count/chain"] == 2
    same_gradients(updater.gradients[0], wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights_untouched(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy, value: float
) -> None:
    updater = Watched(policy, train_config(regulariser="none"), lr=1e-3)
    before = snapshot(policy)
    broken = copy.deepcopy(chains[:2])
    broken[1].image.x_t[0, 0, 0] = value
    sums = updater.run([[micro_batch(golden_checkpoint, broken, [1.0, -1.0])]], [2])
    assert sums["sum/nonfinite"] == 1.0
    assert "count/step" not in sums
    assert metrics_of(sums)["loss/nonfinite"] == 1.0
    assert changed(policy, before) == set()
    assert updater.engine.steps == 0
    # The next update is as if nothing had been: no remainder of the gradient, no moment, no step.
    good = micro_batch(golden_checkpoint, chains, ADVANTAGES)
    sums = updater.run([[good]], [COUNT])
    assert sums["count/step"] == 1
    fresh = store.load(CHECKPOINT).policy
    other = Watched(fresh, train_config(regulariser="none"), lr=1e-3)
    other.run([[good]], [COUNT])
    for name, gradient in other.gradients[0].items():
        assert torch.equal(gradient, updater.gradients[1][name]), name
    assert changed(policy, snapshot(fresh)) == set()


def test_a_positive_advantage_makes_the_chain_likelier(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """The sign, end to end: after the step the rewarded text and latents are likelier, the punished ones less so."""

    def score(chain: Chain) -> tuple[float, float]:
        prompt, ids = chain.text.prompt_ids.tolist(), chain.text.ids.tolist()
        text, image = golden_checkpoint.chat.context_ids(prompt, ids), chain.image
        x, t, t_next = torch.tensor(image.x_t), torch.tensor(image.t), torch.tensor(image.t_next)
        with torch.no_grad():
            logp = policy.token_logprobs([text])[0][len(prompt) - 1 :][: len(ids)].mean().item()
            context = policy.prefill([text]).take(torch.zeros(len(t), dtype=torch.long))
            move = flow.sde_step(t, t_next, 0.7)
            mean = flow.mean_of(move, x, policy.velocity(x, t, context, image.grid))
            return logp, (move.std * flow.step_log_prob(torch.tensor(image.x_next), mean, move.std)).mean().item()

    before = [score(chain) for chain in chains[:2]]
    updater = Watched(policy, train_config(regulariser="none"), lr=2e-5)
    updater.run([[micro_batch(golden_checkpoint, chains[:2], [1.0, -1.0])]], [2])
    after = [score(chain) for chain in chains[:2]]
    assert all(new > old for new, old in zip(after[0], before[0], strict=True))
    assert all(new < old for new, old in zip(after[1], before[1], strict=True))


@pytest.mark.parametrize(("text_weight", "image_weight", "untouched"), [(0.0, 1.0, None), (1.0, 0.0, "denoising")])
def test_one_half_alone(
    golden_checkpoint: Checkpoint,
    chains: list[Chain],
    policy: BagelPolicy,
    text_weight: float,
    image_weight: float,
    untouched: str | None,
) -> None:
    config = train_config(
        text_weight=text_weight, image_weight=image_weight, regulariser="none", image_grad_to_reasoning=False
    )
    updater = Watched(policy, config, lr=1e-3)
    before = snapshot(policy)
    updater.run([[micro_batch(golden_checkpoint, chains, ADVANTAGES)]], [COUNT])
    groups = {role: {name for name, _ in pairs} for role, pairs in policy.parameter_groups().items()}
    trained = "reasoning" if untouched else "denoising"
    assert changed(policy, before) == groups[trained]
    assert isinstance(updater.engine, Engine)
