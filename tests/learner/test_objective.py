"""The two objectives and the regulariser against UniRL's and GRPO-Guard's recorded losses and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from golden_numbers import close, golden, tensor

from common import flow
from learner.objective import clipped_surrogate, image_objective, text_kl, text_objective, velocity_mse

TEXT_CLIPS = [(0.2, 0.2), (0.2, 0.28), (0.01, 0.01)]
LEVELS = ("0.8", "0.7")


def packed_text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """new and old log-probs [P], advantage [C], owner [P], C."""
    numbers = golden("flowgrpo/grpo_text.npz")
    lengths = tensor(numbers["lengths"])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    new = tensor(numbers["new_logp"]).requires_grad_()
    return new, tensor(numbers["old_logp"]), tensor(numbers["advantages"]), owner, len(lengths)


@pytest.mark.parametrize(("low", "high"), TEXT_CLIPS)
def test_recorded_text_losses_and_gradients(low: float, high: float) -> None:
    numbers = golden("flowgrpo/grpo_text.npz")
    new, old, advantage, owner, chains = packed_text()
    found = text_objective(new, old, advantage, owner, chains, low, high)
    case = f"seq-mean-token-mean_{low}_{high}"
    close(found.loss.mean(), numbers[f"{case}_loss"], atol=1e-6)
    found.loss.mean().backward()
    close(new.grad, numbers[f"{case}_grad"], atol=1e-6)
    close(found.ratio, np.exp(numbers["new_logp"] - numbers["old_logp"]), atol=1e-6)
    # Where the clipped branch was taken, nothing flows back.
    assert torch.equal(found.clipped, (new.grad == 0) & (advantage[owner] != 0))


def test_text_loss_of_one_chain_is_its_own() -> None:
    """A chain's loss is the mean over its tokens, whatever else is in the batch."""
    new, old, advantage, owner, chains = packed_text()
    together = text_objective(new, old, advantage, owner, chains, 0.2, 0.2).loss
    for chain in range(chains):
        mine = owner == chain
        alone = text_objective(
            new[mine], old[mine], advantage[[chain]], torch.zeros(int(mine.sum()), dtype=torch.long), 1, 0.2, 0.2
        )
        close(alone.loss[0], together[chain], atol=1e-6)


def test_an_advantage_of_zero_gives_no_gradient() -> None:
    new, old, advantage, owner, chains = packed_text()
    found = text_objective(new, old, torch.zeros_like(advantage), owner, chains, 0.2, 0.2)
    found.loss.sum().backward()
    assert (new.grad == 0).all()
    assert (found.loss == 0).all()


def image_case() -> tuple[dict[str, torch.Tensor], flow.StepCoefficients]:
    """Recorded tensors and the coefficients of the recorded steps, with the noise level that explains their std."""
    numbers = {name: tensor(array) for name, array in golden("flowgrpo/unigrpo_image.npz").items()}
    t, t_next = numbers["sigmas"][numbers["steps"]], numbers["sigmas"][numbers["steps"] + 1]
    level = (numbers["std_var"] / flow.sde_step(t, t_next, 1.0).std).mean().item()
    return numbers, flow.sde_step(t, t_next, level)


def test_recorded_means_and_log_probs() -> None:
    numbers, move = image_case()
    close(move.std, numbers["std_var"])
    x, x_next = numbers["latents"][:-1], numbers["latents"][1:]
    for which, velocity in (("old", "v_old"), ("new", "v_theta")):
        mean = flow.mean_of(move, x, numbers[velocity])
        close(mean, numbers[f"{which}_mean"])
        close(flow.step_log_prob(x_next, mean, move.std), numbers[f"{which}_logp"])
    found = flow.ratio_norm_log(x_next, numbers["old_mean"], numbers["new_mean"], move.std)
    close(found, numbers["log_ratio_norm_f64"], atol=1e-7, rtol=1e-3)


CASES = [(i, *case) for i, case in enumerate(golden("flowgrpo/unigrpo_image.npz")["cases"].tolist()) if not case[3]]


@pytest.mark.parametrize(("index", "advantage", "clip", "ratio_norm", "reweight", "weight"), CASES)
def test_recorded_image_losses_and_gradients(
    index: int, advantage: float, clip: float, ratio_norm: float, reweight: float, weight: float
) -> None:
    """RatioNorm and the plain ratio; the re-weighted gradient is no option of ours."""
    numbers, move = image_case()
    x, x_next = numbers["latents"][:-1], numbers["latents"][1:]
    velocity = numbers["v_theta"].requires_grad_()
    ratio = flow.ratio_norm_log if ratio_norm else flow.plain_log_ratio
    mean, mean_old = flow.mean_of(move, x, velocity), flow.mean_of(move, x, numbers["v_old"])
    log_ratio = ratio(x_next, mean_old, mean, move.std)[None]
    found = image_objective(log_ratio, torch.tensor([advantage]), clip)
    mse = velocity_mse(velocity[None], numbers["v_ref"][None]).mean(1)
    loss = (found.loss + weight * mse).sum()

    close(loss, numbers["loss"][index], atol=1e-6, rtol=0)
    if weight:
        close(mse[0], numbers["velocity_mse"][index], atol=1e-6)
    mean_ratio, lowest, highest, outside = numbers["ratio_stats"][index]
    close(found.ratio.mean(), mean_ratio, atol=1e-6)
    close(found.ratio.min(), lowest, atol=1e-6)
    close(found.ratio.max(), highest, atol=1e-6)
    close(((found.ratio - 1).abs() > clip).double().mean(), outside)
    loss.backward()
    wanted = numbers["grad_v"][index]
    close(velocity.grad, wanted, atol=3e-5 * wanted.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_guard_losses(level: str) -> None:
    """GRPO-Guard's script on every step: its loss is divided by -dt, and its clip is 3e-4."""
    s = {name: tensor(array) for name, array in golden("flowgrpo/sde_steps.npz").items()}
    guard = golden("flowgrpo/guard.npz")
    bound = float(guard["adv_clip_max"])
    for i in range(len(guard["advantages"])):
        advantage = tensor(guard["advantages"][i]).clamp(-bound, bound)
        std = (s[f"sde_{level}_std"][i] * s[f"sde_{level}_sqrt_dt"][i]).expand(2)
        means = (s[f"sde_{level}_prev"][i], s[f"sde_{level}_mean"][i], s[f"sde_{level}_new_mean"][i], std)
        found = image_objective(flow.ratio_norm_log(*means)[:, None], advantage, 3e-4).loss
        close(found, guard[f"rationorm_{level}_bs1_loss"][i] * s[f"sde_{level}_sqrt_dt"][i].item() ** 2, atol=2e-5)
        found = image_objective(flow.plain_log_ratio(*means)[:, None], advantage, 3e-4).loss
        close(found, guard[f"plain_{level}_bs1_loss"][i], atol=2e-5)


def test_a_clip_of_a_few_fp32_ulps_still_clips() -> None:
    log_ratio = torch.tensor([5e-7, 2e-6, -2e-6, 0.0, 2e-6], requires_grad=True)
    loss, clipped = clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0]), 1e-6, 1e-6)
    loss.sum().backward()
    assert clipped.tolist() == [False, True, True, False, False]
    assert (log_ratio.grad != 0).tolist() == [True, False, False, True, True]


def test_first_update_is_reinforce() -> None:
    """At ratio 1 the gradient of a token is -A / length, of a window step -A / steps."""
    new, _, advantage, owner, chains = packed_text()
    found = text_objective(new, new.detach(), advantage, owner, chains, 0.2, 0.2)
    found.loss.sum().backward()
    assert (found.ratio == 1).all()
    assert not found.clipped.any()
    close(new.grad, -advantage[owner] / owner.bincount()[owner], atol=1e-7)
    log_ratio = torch.zeros(2, 3, requires_grad=True)
    image = image_objective(log_ratio, torch.tensor([0.5, -2.0]), 1e-6)
    image.loss.sum().backward()
    close(log_ratio.grad, torch.tensor([[-0.5 / 3] * 3, [2.0 / 3] * 3]), atol=1e-7)


def test_text_kl_is_k3_and_is_zero_for_equal_policies() -> None:
    new, old, _, owner, chains = packed_text()
    found = text_kl(new, old, owner, chains)
    d = (old - new).detach().double()
    k3 = d.exp() - d - 1
    close(found, torch.stack([k3[owner == chain].mean() for chain in range(chains)]), atol=1e-6)
    assert (found > 0).all()
    assert text_kl(new, new.detach(), owner, chains).tolist() == [0.0] * chains
    # k3's expectation under the policy is the exact KL.
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.2])
    sampled = [text_kl(p.log()[[k]], q.log()[[k]], torch.zeros(1, dtype=torch.long), 1).item() for k in range(3)]
    assert sum(w * s for w, s in zip(p.tolist(), sampled, strict=True)) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)), abs=1e-6
    )


def test_velocity_mse_is_a_mean_over_latent_dimensions() -> None:
    one, two = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    one[1, 2, 3, 4] = 2.0
    wanted = torch.zeros(2, 3)
    wanted[1, 2] = 4 / 20
    close(velocity_mse(one, two), wanted)
    assert (velocity_mse(one, one) == 0).all()
