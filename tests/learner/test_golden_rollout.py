"""flow_grpo's replay of its own rollout on the recorded checkpoint: log-probs, means, losses and gradients."""

from __future__ import annotations

import pytest
import torch
from golden_numbers import CHECKPOINT, close, described, meaning, named, stated, tensors

from common import flow
from common.bagel import checkpoint as store
from common.bagel.policy import BagelPolicy
from learner.objective import image_objective

FILE = "flowgrpo/rollout.npz"
ABOUT = described("flowgrpo")["rollout.npz"]
LEVEL = stated(ABOUT["what"], "noise")
SHIFT = stated(ABOUT["what"], "shift")


def quadratic(x_next: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Their BAGEL path leaves the constants of the Gaussian out."""
    return -((x_next - mean) ** 2).flatten(1).mean(1) / (2 * std**2)


@pytest.fixture
def policy() -> BagelPolicy:
    return store.load(CHECKPOINT).policy


def growth(case: str) -> float:
    """What the generation expert was multiplied with before a case's replay."""
    told = meaning(FILE, f"{case}_log_probs")
    if "weights unchanged" in told:
        return 1.0
    return growth("scaled") if "same weights as scaled" in told else stated(told, "by")


@pytest.mark.parametrize("case", named(FILE, "(.+)_policy_loss"))
def test_replayed_window(policy: BagelPolicy, case: str) -> None:
    """The rollout's numbers are the old policy; `scaled` is a policy whose generation expert has grown."""
    call = meaning(FILE, f"{case}_policy_loss")
    factor, clip, advantage = growth(case), stated(call, "clip_range"), stated(call, "advantage")
    numbers = tensors(FILE)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "_moe_gen" in name:
                parameter.mul_(factor)
    rows, cols = store.load(CHECKPOINT).config.grid(*numbers["image_hw"].tolist())
    times = torch.tensor(flow.timesteps(len(numbers["velocities"]) + 1, SHIFT), dtype=torch.float32)
    first, size = int(numbers["window_begin"]), len(numbers["window_timesteps"])
    t, t_next = times[first : first + size], times[first + 1 : first + 1 + size]
    close(t, numbers["window_timesteps"], atol=1e-6)
    x, x_next = numbers["window_latents"][:-1], numbers["window_latents"][1:]
    move = flow.sde_step(t, t_next, LEVEL)

    context = policy.prefill([numbers["ctx_ids"].tolist()]).take(torch.zeros(size, dtype=torch.long))
    mean = flow.mean_of(move, x, policy.velocity(x, t, context, (rows, cols)))
    mean_old = flow.mean_of(move, x, numbers["velocities"][first : first + size])
    close(mean, numbers[f"{case}_means"])
    close(quadratic(x_next, mean, move.std), numbers[f"{case}_log_probs"])
    close(quadratic(x_next, mean_old, move.std), numbers["window_log_probs"])
    log_ratio = flow.plain_log_ratio(x_next, mean_old, mean, flow.step_precision(move.std))
    close(log_ratio.exp(), numbers[f"{case}_ratio"], atol=1e-5)

    ones = torch.ones(size, 1)
    found = image_objective(log_ratio[:, None], torch.full((size,), advantage), 0 * ones, ones, "clip", clip)
    close(found.loss.mean(), numbers[f"{case}_policy_loss"], atol=1e-5)
    ratio = numbers[f"{case}_ratio"]
    outside = [((ratio - 1).abs() > clip), ratio - 1 > clip, 1 - ratio > clip]
    close(torch.stack([part.float().mean() for part in outside]), numbers[f"{case}_clipfrac"], atol=1e-6)

    parameters = {name: policy.get_parameter(f"language_model.{name}") for name in ABOUT["grad_names"]}
    for step, loss in enumerate(found.loss):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        norms = torch.stack([gradient.norm() for gradient in gradients])
        wanted = numbers[f"{case}_grad_norms"][step]
        close(norms, wanted, atol=2e-4 * wanted.max().item() + 1e-12, rtol=2e-3)
        for name, gradient in zip(parameters, gradients, strict=True):
            if (recorded := numbers.get(f"{case}_grad:{name}")) is not None:
                scale = recorded[step].abs().max().item()
                close(gradient, recorded[step], atol=2e-3 * scale + 1e-12, rtol=2e-3)
