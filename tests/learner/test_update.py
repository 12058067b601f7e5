"""The joint update on a real DeepSpeed engine: its first step is exact, and nothing is computed twice."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from chains import WINDOW, changed, micro_batch, snapshot, train_config
from golden_numbers import close
from watched import (
    ADVANTAGES,
    COUNT,
    Watched,
    reinforce,
    same_gradients,
)

from common import flow
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.types import Chain
from learner.reference import HostReference
from learner.update import lay_out

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("image_grad_to_reasoning", [True, False])
@pytest.mark.parametrize("epochs", [1, 2])
def test_first_update_has_ratio_one_and_distance_zero(
    golden_checkpoint: Checkpoint,
    chains: list[Chain],
    policy: BagelPolicy,
    epochs: int,
    image_grad_to_reasoning: bool,
) -> None:
    config = train_config(epochs=epochs, image_grad_to_reasoning=image_grad_to_reasoning, regulariser_weight=1.5e-5)
    updater = Watched(policy, config, reference=True, lr=1e-3)
    micro = [
        micro_batch(golden_checkpoint, chains[:4], ADVANTAGES[:4]),
        micro_batch(golden_checkpoint, chains[4:], ADVANTAGES[4:]),
    ]
    sums = updater.run([micro], [COUNT])
    first = updater.losses[0]
    assert first["count/chain"] == COUNT
    assert first["sum/text/ratio"] == first["count/token"] == sum(len(chain.text.ids) for chain in chains)
    assert first["sum/image/ratio"] == first["count/window"] == COUNT * WINDOW
    assert first["sum/image/log_ratio_abs"] == 0.0
    assert first["sum/image/velocity_mse"] == 0.0
    assert first["sum/text/clipped"] == first["sum/image/clipped"] == 0
    # What the rollout recorded differs by rounding alone.
    assert first["sum/text/logprob_diff"] / first["count/token"] < 1e-5
    assert first["sum/image/velocity_diff"] / first["count/chain"] < 1e-5
    assert sums["count/step"] == epochs
    if epochs == 2:
        # The old policy stays that of before the first step, and so does the reference.
        second = updater.losses[1]
        assert second["sum/image/log_ratio_abs"] > 0
        assert second["sum/image/velocity_mse"] > 0
        assert abs(second["sum/text/ratio"] / second["count/token"] - 1) > 1e-3


@pytest.mark.parametrize(("epochs", "policy_forwards"), [(1, 2), (2, 4)])
@pytest.mark.parametrize("on_host", [False, True])
def test_nothing_is_computed_twice(
    golden_checkpoint: Checkpoint,
    chains: list[Chain],
    policy: BagelPolicy,
    epochs: int,
    policy_forwards: int,
    on_host: bool,
) -> None:
    """The first optimizer step needs no pass of the old policy, nor a later one over the same chains, and no number of
    steps a second one of the reference."""
    updater = Watched(policy, train_config(epochs=epochs), reference=not on_host, lr=1e-3)
    if on_host:
        updater.reference = HostReference(policy)
    reference = policy if on_host else updater.reference
    asked: Counter[str] = Counter()
    policy.register_forward_pre_hook(lambda *_: asked.update(["policy"]))
    reference.register_forward_pre_hook(lambda *_: asked.update(["reference"]))  # type: ignore[union-attr]
    micro = [micro_batch(golden_checkpoint, part, ADVANTAGES[: len(part)]) for part in (chains[:4], chains[4:])]
    updater.run([micro], [COUNT])
    if on_host:
        assert asked["policy"] == policy_forwards + 2
    else:
        assert asked == {"policy": policy_forwards, "reference": 2}
    assert updater.losses[0]["sum/image/velocity_mse"] == 0.0
    assert epochs == 1 or updater.losses[1]["sum/image/velocity_mse"] > 0


def test_a_reference_on_the_host_answers_as_it_was_and_leaves_the_policy_alone(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    reference, original = HostReference(policy), copy.deepcopy(policy)
    batch = micro_batch(golden_checkpoint, chains, ADVANTAGES).packed
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
        moved = snapshot(policy)
        with reference:
            found = reference(batch)
        assert torch.equal(found.velocity, original(batch).velocity)
    assert not changed(policy, moved)
    with pytest.raises(RuntimeError, match="within `with reference:`"):
        reference(batch)


@pytest.mark.parametrize("image_grad", [True, False])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_first_gradient_is_that_of_reinforce(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy, zero_stage: int, image_grad: bool
) -> None:
    weights = {"image_weight": 0.5, "text_weight": 2.0}
    wanted = reinforce(policy, golden_checkpoint, chains, ADVANTAGES, image_grad=image_grad, **weights)
    config = train_config(regulariser="none", image_grad_to_reasoning=image_grad, **weights)
    updater = Watched(policy, config, lr=0.0, zero_stage=zero_stage)
    sums = updater.run([[micro_batch(golden_checkpoint, chains, ADVANTAGES)]], [COUNT])
    same_gradients(updater.gradients[0], wanted)
    for role, pairs in policy.parameter_groups().items():
        norm = math.sqrt(sum(wanted[name].double().square().sum().item() for name, _ in pairs))
        close(sums[f"sum/grad_norm/{role}"], norm, rtol=1e-3)


def test_micro_batches_add_up_to_the_same_gradient(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    wanted = reinforce(policy, golden_checkpoint, chains, ADVANTAGES)
    updater = Watched(policy, train_config(regulariser="none"), lr=0.0)
    cut = [slice(0, 1), slice(1, 4), slice(4, 6)]
    updater.run([[micro_batch(golden_checkpoint, chains[part], ADVANTAGES[part]) for part in cut]], [COUNT])
    same_gradients(updater.gradients[0], wanted)


def test_epochs_and_minibatches_are_optimizer_steps(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """Two passes over two parts: four steps, each with the gradient of its part alone. The rates are 0, so that the
    old policy, of a pass without gradient or of an earlier one, must be exactly the gradient pass's own."""
    wanted = [reinforce(policy, golden_checkpoint, chains[i : i + 3], ADVANTAGES[i : i + 3]) for i in (0, 3)]
    updater = Watched(policy, train_config(regulariser="none", epochs=2, minibatches=2), lr=0.0)
    parts = [[micro_batch(golden_checkpoint, chains[i : i + 3], ADVANTAGES[i : i + 3])] for i in (0, 3)]
    sums = updater.run(parts, [3, 3])
    assert sums["count/step"] == updater.engine.steps == 4
    for found, one in zip(updater.gradients, wanted * 2, strict=True):
        same_gradients(found, one)
    for sums in updater.losses[:-1]:
        assert sums["sum/text/ratio"] == sums["count/token"] > 0
        assert sums["sum/image/ratio"] == sums["count/window"] == 3 * WINDOW
        assert sums["sum/image/log_ratio_abs"] == 0.0


def test_a_filler_adds_nothing(golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy) -> None:
    wanted = reinforce(policy, golden_checkpoint, chains[:3], ADVANTAGES[:3])
    updater = Watched(policy, train_config(regulariser="none"), lr=0.0)
    filler = lay_out(chains[5:], [5.0], [0.0], golden_checkpoint, 0, "cpu")
    sums = updater.run([[micro_batch(golden_checkpoint, chains[:3], ADVANTAGES[:3]), filler]], [3])
    same_gradients(updater.gradients[0], wanted)
    assert sums["count/chain"] == 3
    assert sums["count/window"] == 3 * WINDOW


def test_regulariser_pulls_towards_the_reference_under_its_own_context(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """With advantages of zero only w ||v - v_ref||^2 is left; the reference's keys and values are its own."""
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for _, parameter in policy.parameter_groups()["reasoning"]:
            parameter.mul_(1.1)
    wanted_mse = []
    for chain in chains[:2]:
        text = golden_checkpoint.chat.context_ids(chain.text.prompt_ids.tolist(), chain.text.ids.tolist())
        x, t = torch.tensor(chain.image.x_t), torch.tensor(chain.image.t)
        v = [
            p.velocity(x, t, p.prefill([text]).take(torch.zeros(len(t), dtype=torch.long)), chain.image.grid)
            for p in (policy, reference)
        ]
        wanted_mse.append((v[0] - v[1].detach()).square().mean())
    policy.zero_grad()
    (0.5 * torch.stack(wanted_mse).mean()).backward()
    trained = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    updater = Watched(policy, train_config(regulariser_weight=0.5, image_grad_to_reasoning=True), lr=0.0)
    updater.reference = reference
    sums = updater.run([[micro_batch(golden_checkpoint, chains[:2], [0.0, 0.0], version=1)]], [2])
    close(sums["sum/image/velocity_mse"] / 2, torch.stack(wanted_mse).mean(), rtol=1e-3)
    for name, gradient in trained.items():
        close(updater.gradients[0][name], gradient, atol=2e-4 * gradient.abs().max().item() + 1e-9, rtol=1e-3)


def test_plain_ratio_weighs_a_step_by_its_inverse_std(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """Both ratios start at 1; they differ in the gradient."""
    gradients = []
    for ratio_norm in (True, False):
        copied = copy.deepcopy(policy)
        updater = Watched(copied, train_config(ratio_norm=ratio_norm, regulariser="none", text_weight=0.0), lr=0.0)
        one = copy.deepcopy(chains[0])
        image = one.image
        for name in ("x_t", "x_next", "v_old", "t", "t_next"):
            object.__setattr__(image, name, getattr(image, name)[1:2])
        updater.run([[micro_batch(golden_checkpoint, [one], [1.0])]], [1])
        assert updater.losses[0]["sum/image/ratio"] == 1.0
        gradients.append(updater.gradients[0]["llm2vae.weight"])
        std = flow.sde_step(torch.tensor(image.t), torch.tensor(image.t_next), 0.7).std.item()
    scale = gradients[0].abs().max().item()
    close(gradients[1] * std, gradients[0], atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize("regulariser", ["velocity_mse", "latent_kl"])
def test_the_regulariser_pulls_once_the_policy_has_moved(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy, regulariser: str
) -> None:
    """Its gradient is exactly zero at the reference and not zero after a step; every advantage here is zero."""
    updater = Watched(policy, train_config(regulariser=regulariser, regulariser_weight=1.0), reference=True, lr=0.0)
    micro = micro_batch(golden_checkpoint, chains, [0.0] * COUNT)
    updater.run([[micro]], [COUNT])
    assert all(not gradient.any() for gradient in updater.gradients[0].values())
    with torch.no_grad():
        for _, parameter in policy.parameter_groups()["denoising"]:
            parameter.mul_(1.05)
    updater.run([[micro]], [COUNT])
    moved = updater.gradients[1]
    assert all(moved[name].any() for name, _ in policy.parameter_groups()["denoising"])
