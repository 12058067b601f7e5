"""The two objectives and the regulariser against UniRL's and GRPO-Guard's recorded losses and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from golden_numbers import close, golden, meaning, named, stated, tensor, tensors

from common import flow
from learner.objective import (
    REGULARISERS,
    TEXT_LENGTHS,
    TEXT_RATIOS,
    Surrogate,
    clipped_surrogate,
    guard_weight,
    image_objective,
    importance_weight,
    sum_by_chain,
    text_kl,
    text_objective,
    velocity_mse,
)

TEXT = "flowgrpo/grpo_text.npz"
TEXT_CLIPS = named(TEXT, "token-mean_(.+)_loss")
AGGREGATIONS = {
    "seq-mean-token-mean": "chain_mean",
    "token-mean": "token_mean",
    "seq-mean-token-sum-norm": "constant_length",
}
HORIZON = stated(meaning(TEXT, f"seq-mean-token-sum-norm_{TEXT_CLIPS[0]}_loss"), "horizon")
LEVELS = named("flowgrpo/guard.npz", "rationorm_(.+)_bs1_loss")


def text_loss(
    new: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    owner: torch.Tensor,
    low: float = 0.2,
    high: float = 0.2,
    aggregation: str = "chain_mean",
    ratio: str = "token",
    weight: torch.Tensor | None = None,
) -> Surrogate:
    """The text objective as the learner puts it together."""
    chains = len(advantage)
    own = sum_by_chain(torch.ones(len(owner)), owner, chains)
    lengths = TEXT_LENGTHS[aggregation](own, len(owner) / chains, HORIZON)
    log_ratio = TEXT_RATIOS[ratio](new - old, owner, chains)
    weight = torch.ones(len(owner)) if weight is None else weight
    return text_objective(log_ratio, advantage, weight, owner, lengths, low, high)


def image_loss(
    log_ratio: torch.Tensor,
    advantage: torch.Tensor,
    bound: float,
    divergence: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    trust: str = "clip",
) -> Surrogate:
    divergence = torch.zeros_like(log_ratio) if divergence is None else divergence
    weight = torch.ones_like(log_ratio) if weight is None else weight
    return image_objective(log_ratio, advantage, divergence, weight, trust, bound)


def packed_text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """new and old log-probs [P], advantage [C], owner [P], C."""
    numbers = golden(TEXT)
    lengths = tensor(numbers["lengths"])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    new = tensor(numbers["new_logp"]).requires_grad_()
    return new, tensor(numbers["old_logp"]), tensor(numbers["advantages"]), owner, len(lengths)


@pytest.mark.parametrize("recorded", AGGREGATIONS)
@pytest.mark.parametrize("clips", TEXT_CLIPS)
def test_recorded_text_losses_and_gradients(recorded: str, clips: str) -> None:
    numbers, (low, high) = golden(TEXT), map(float, clips.split("_"))
    new, old, advantage, owner, _ = packed_text()
    found = text_loss(new, old, advantage, owner, low, high, AGGREGATIONS[recorded])
    case = f"{recorded}_{clips}"
    close(found.loss.mean(), numbers[f"{case}_loss"], atol=1e-6)
    found.loss.mean().backward()
    close(new.grad, numbers[f"{case}_grad"], atol=1e-6)
    close(found.ratio, np.exp(numbers["new_logp"] - numbers["old_logp"]), atol=1e-6)
    # Where the clipped branch was taken, nothing flows back; the recorded fraction counts every ratio out of bounds.
    assert torch.equal(found.clipped, (new.grad == 0) & (advantage[owner] != 0))
    outside = (found.ratio < 1 - low) | (found.ratio > 1 + high)
    close(outside.double().mean(), numbers[f"{case}_clipfrac"], atol=1e-6)


def test_text_loss_of_one_chain_is_its_own() -> None:
    """A chain's loss is the mean over its tokens, whatever else is in the batch."""
    new, old, advantage, owner, chains = packed_text()
    for ratio in TEXT_RATIOS:
        together = text_loss(new, old, advantage, owner, ratio=ratio).loss
        for chain in range(chains):
            mine = owner == chain
            alone = text_loss(new[mine], old[mine], advantage[[chain]], torch.zeros_like(owner[mine]), ratio=ratio)
            close(alone.loss[0], together[chain], atol=1e-6)


def test_an_advantage_of_zero_gives_no_gradient() -> None:
    new, old, advantage, owner, _ = packed_text()
    found = text_loss(new, old, torch.zeros_like(advantage), owner)
    found.loss.sum().backward()
    assert (new.grad == 0).all()
    assert (found.loss == 0).all()


def test_sequence_ratio_is_the_geometric_mean_and_clips_whole_chains() -> None:
    """GSPO: -min(s A, clip(s) A) with one s per chain, and its gradient s A / length on every token."""
    new, old, advantage, owner, chains = packed_text()
    found = text_loss(new, old, advantage, owner, 0.02, 0.02, ratio="sequence")
    found.loss.sum().backward()
    for chain in range(chains):
        mine, a = owner == chain, advantage[chain].item()
        s = (new - old)[mine].detach().mean().exp().item()
        clip = min(max(s, 0.98), 1.02)
        assert found.loss[chain].item() == pytest.approx(-min(s * a, clip * a), abs=1e-6)
        slope = -s * a / int(mine.sum()) if s * a <= clip * a else 0.0
        close(new.grad[mine], torch.full((int(mine.sum()),), slope), atol=1e-6)
    assert found.clipped.any()
    assert not found.clipped.all()


def test_importance_weights_are_capped_constants() -> None:
    old = torch.tensor([-1.0, -1.0, -0.1], requires_grad=True)
    found = importance_weight(old, torch.tensor([-1.0, -0.5, -3.0]), 2.0)
    close(found, torch.tensor([1.0, math.exp(-0.5), 2.0]), atol=1e-6)
    assert not found.requires_grad
    new, logp, advantage, owner, _ = packed_text()
    weighted = text_loss(new, logp, advantage, owner, weight=torch.full((len(owner),), 0.5))
    close(weighted.loss, text_loss(new, logp, advantage, owner).loss / 2, atol=1e-6)


def image_case() -> tuple[dict[str, torch.Tensor], flow.StepCoefficients]:
    """Recorded tensors and the coefficients of the recorded steps, with the noise level that explains their std."""
    numbers = tensors("flowgrpo/unigrpo_image.npz")
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
    close(x_next, numbers["old_mean"] + move.std[:, None, None] * numbers["noise"])
    found = flow.ratio_norm_log(x_next, numbers["old_mean"], numbers["new_mean"], move.std)
    close(found, numbers["log_ratio_norm_f64"], atol=1e-7, rtol=1e-3)


CASES = [(i, *case) for i, case in enumerate(golden("flowgrpo/unigrpo_image.npz")["cases"].tolist())]


@pytest.mark.parametrize(("index", "advantage", "clip", "ratio_norm", "reweight", "weight"), CASES)
def test_recorded_image_losses_and_gradients(
    index: int, advantage: float, clip: float, ratio_norm: float, reweight: float, weight: float
) -> None:
    """RatioNorm and the plain ratio, with and without the re-weighted gradient."""
    numbers, move = image_case()
    x, x_next = numbers["latents"][:-1], numbers["latents"][1:]
    velocity = numbers["v_theta"].requires_grad_()
    mean, mean_old = flow.mean_of(move, x, velocity), flow.mean_of(move, x, numbers["v_old"])
    if ratio_norm:
        log_ratio = flow.ratio_norm_log(x_next, mean_old, mean, move.std)[None]
    else:
        log_ratio = flow.plain_log_ratio(x_next, mean_old, mean, flow.step_precision(move.std))[None]
    dt = numbers["sigmas"].diff()[numbers["steps"]][None]
    steps = guard_weight(dt) if reweight else torch.ones_like(dt)
    found = image_loss(log_ratio, torch.tensor([advantage]), clip, weight=steps)
    mse = velocity_mse(velocity, numbers["v_ref"]).mean()
    loss = found.loss.sum() + weight * mse

    close(loss, numbers["loss"][index], atol=1e-6, rtol=0)
    if weight:
        close(mse, numbers["velocity_mse"][index], atol=1e-6)
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
    """GRPO-Guard's script on every step: its loss is divided by -dt, which is our re-weight times the mean of 1/dt.
    Called over a batch, it gives all samples the batch's mean bias."""
    s = tensors("flowgrpo/sde_steps.npz")
    guard = tensors("flowgrpo/guard.npz")
    bound = guard["adv_clip_max"].item()
    clip = stated(meaning("flowgrpo/guard.npz", f"rationorm_{level}_bs1_loss"), "clip")
    std = s[f"sde_{level}_std"] * s[f"sde_{level}_sqrt_dt"]
    advantage = guard["advantages"].clamp(-bound, bound)
    steps, batch = advantage.shape
    parts = [s[f"sde_{level}_{part}"].flatten(0, 1) for part in ("prev", "mean", "new_mean")]
    scale = std.repeat_interleave(batch)
    norm = flow.ratio_norm_log(*parts, scale).view(steps, batch)
    plain = flow.plain_log_ratio(*parts, flow.step_precision(scale)).view(steps, batch)
    dt = -(s[f"sde_{level}_sqrt_dt"] ** 2)

    weight = guard_weight(dt[None]) * (1 / dt.abs()).mean()
    for i in range(batch):
        surrogates = [
            image_loss(log_ratio[:, i, None], advantage[:, i], clip, weight=factor)
            for log_ratio, factor in ((norm, weight.T), (plain, torch.ones(steps, 1)))
        ]
        for name, found in zip(("rationorm", "plain"), surrogates, strict=True):
            close(found.ratio[:, 0], guard[f"{name}_{level}_bs1_ratio"][:, i], atol=3e-6, rtol=3e-6)
            close(found.loss, guard[f"{name}_{level}_bs1_loss"][:, i], atol=1e-4, rtol=2e-5)

    bias = ((parts[1] - parts[2]) ** 2).flatten(1).mean(1).view(steps, batch) / (2 * std[:, None] ** 2)
    shared = norm + std[:, None] * (bias.mean(1, keepdim=True) - bias)
    for name, log_ratio, factor in (("rationorm", shared, weight.T), ("plain", plain, torch.ones(steps, 1))):
        close(log_ratio.exp(), guard[f"{name}_{level}_batch_ratio"], atol=3e-6, rtol=3e-6)
        found = [image_loss(log_ratio[:, i, None], advantage[:, i], clip, weight=factor).loss for i in range(batch)]
        close(torch.stack(found).mean(0)[:, None], guard[f"{name}_{level}_batch_loss"], atol=1e-4, rtol=2e-5)


def test_guard_weight_keeps_the_scale_of_the_objective() -> None:
    found = guard_weight(torch.tensor([[-0.1, -0.2, -0.4], [-0.3, -0.3, -0.3]]))
    close(found, torch.tensor([[12 / 7, 6 / 7, 3 / 7], [1, 1, 1]]), atol=1e-6)


def test_kl_mask_stops_what_leads_further_away_and_nothing_else() -> None:
    """Flow-DPPO: beyond the bound, A > 0 with r > 1 and A < 0 with r < 1 get no gradient; the way back stays open."""
    log_ratio = torch.tensor([[0.1, -0.1, 0.1], [0.1, -0.1, -0.1]], requires_grad=True)
    divergence = torch.tensor([[2e-5, 2e-5, 1e-6], [2e-5, 2e-5, 1e-6]])
    advantage = torch.tensor([1.0, -2.0])
    found = image_loss(log_ratio, advantage, 1e-5, divergence, trust="kl")
    found.loss.sum().backward()
    assert found.clipped.tolist() == [[True, False, False], [False, True, False]]
    wanted = -advantage[:, None] * log_ratio.detach().exp() / 3
    close(log_ratio.grad, torch.where(found.clipped, 0.0, wanted), atol=1e-6)
    close(found.loss, wanted.sum(1), atol=1e-6)


@pytest.mark.parametrize("name", REGULARISERS)
def test_regularisers_are_zero_at_the_reference_and_pull_towards_it(name: str) -> None:
    numbers, move = image_case()
    velocity, reference = numbers["v_theta"].requires_grad_(), numbers["v_ref"]
    assert REGULARISERS[name](reference, reference, move).tolist() == [0.0] * len(reference)
    found = REGULARISERS[name](velocity, reference, move)
    found.sum().backward()
    assert (found > 0).all()
    per_image = (velocity.grad * (velocity - reference)).flatten(1).sum(1)
    close(per_image, 2 * found, rtol=1e-4)
    if name == "latent_kl":
        x = numbers["latents"][:-1]
        gap = flow.mean_of(move, x, velocity) - flow.mean_of(move, x, reference)
        close(found, (gap**2).mean((1, 2)) / (2 * move.std**2), rtol=1e-3)


def test_a_clip_of_a_few_fp32_ulps_still_clips() -> None:
    log_ratio = torch.tensor([5e-7, 2e-6, -2e-6, 0.0, 2e-6], requires_grad=True)
    loss, clipped = clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0]), 1e-6, 1e-6)
    loss.sum().backward()
    assert clipped.tolist() == [False, True, True, False, False]
    assert (log_ratio.grad != 0).tolist() == [True, False, False, True, True]


def test_beyond_a_tiny_clip_there_is_no_gradient_at_all() -> None:
    """exp rounds the bound and what lies just beyond it to the same ratio."""
    beyond = torch.linspace(1e-6, 1.3e-6, 200)[1:]
    log_ratio = torch.cat([beyond, -beyond]).requires_grad_()
    advantage = torch.ones(len(log_ratio)).copysign(log_ratio.detach())
    loss, clipped = clipped_surrogate(log_ratio, advantage, 1e-6, 1e-6)
    loss.sum().backward()
    assert clipped.all() and not log_ratio.grad.any()


def test_first_update_is_reinforce() -> None:
    """At ratio 1 the gradient of a token is -A / length, of a window step -A / steps."""
    new, _, advantage, owner, _ = packed_text()
    found = text_loss(new, new.detach(), advantage, owner)
    found.loss.sum().backward()
    assert (found.ratio == 1).all()
    assert not found.clipped.any()
    close(new.grad, -advantage[owner] / owner.bincount()[owner], atol=1e-7)
    log_ratio = torch.zeros(2, 3, requires_grad=True)
    image = image_loss(log_ratio, torch.tensor([0.5, -2.0]), 1e-6)
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
