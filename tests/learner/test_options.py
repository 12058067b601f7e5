"""Every option of the objective reaches the loss: against the formulas written out, once the policy has moved."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chains import make_chains, micro_batch
from golden_numbers import CHECKPOINT, close

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.config import TrainConfig
from common.policy import PolicyOutput
from common.recipe import validate
from learner.update import MicroBatch, Updater

ADVANTAGES = [1.2, -0.7, 0.4, -1.6]
CLIP, LEVEL = 2e-4, 0.6
PARAMETERS = ("llm2vae.weight", "language_model.lm_head.weight")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"text_clip_low": 0.01, "text_clip_high": 0.05},
    {"text_ratio": "sequence", "text_clip_low": 0.001, "text_clip_high": 0.004},
    {"text_kl": 0.5},
    {"text_weight": 0.3, "image_weight": 1.7},
    {"ratio_norm": False},
    {"image_reweight": True},
    {"image_trust": "kl", "image_kl_bound": 1e-5},
    {"sampler": "dance"},
    {"sampler": "flow_cps"},
    {"sampler": "flow_cps", "ratio_norm": False},
]


@pytest.fixture(scope="module")
def micro(golden_checkpoint: Checkpoint) -> MicroBatch:
    """Chains of the policy before it moved: the ratio is against what it recorded."""
    return micro_batch(golden_checkpoint, make_chains(golden_checkpoint, len(ADVANTAGES)), ADVANTAGES, version=1)


def moved() -> BagelPolicy:
    policy = store.load(CHECKPOINT).policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    return policy


def text_term(o: Any, micro: MicroBatch, new: torch.Tensor, reference: torch.Tensor, chain: int) -> torch.Tensor:
    mine, a = micro.token_owner == chain, micro.advantage[chain]
    log_ratio = (new - micro.behaviour)[mine]
    if o.text_ratio == "sequence":
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    r = log_ratio.exp()
    gain = torch.minimum(r * a, r.clamp(1 - o.text_clip_low, 1 + o.text_clip_high) * a).mean()
    d = (reference - new)[mine]
    return o.text_weight * gain - o.text_kl * (d.exp() - d - 1).mean()


def step_of(sampler: str, x: torch.Tensor, v: torch.Tensor, t: float, later: float) -> tuple[torch.Tensor, float]:
    """mu and s of one reverse step."""
    dt = later - t
    if sampler == "flow_cps":
        s = later * math.sin(LEVEL * math.pi / 2)
        return (1 - later) * (x - t * v) + math.sqrt(later**2 - s**2) * (x + (1 - t) * v), s
    variance = LEVEL**2 * (1 if sampler == "dance" else t / (1 - (later if t == 1 else t)))
    mu = x * (1 + variance / (2 * t) * dt) + v * (1 + variance * (1 - t) / (2 * t)) * dt
    return mu, math.sqrt(-variance * dt)


def image_term(config: TrainConfig, micro: MicroBatch, velocity: torch.Tensor, chain: int) -> torch.Tensor:
    o, a, terms, weights = config.objective, micro.advantage[chain], [], []
    for image in range(chain * micro.window, (chain + 1) * micro.window):
        t, later = micro.packed.t[image].item(), micro.t_next[image].item()
        (mu, s), (old, _) = (
            step_of(config.sampling.sampler, micro.packed.x_t[image], v[image], t, later)
            for v in (velocity, micro.v_old)
        )
        after, kl = micro.x_next[image], ((old - mu) ** 2).mean() / (2 * s**2)
        if o.ratio_norm:
            log_ratio = -((after - old) / s * (old - mu)).mean()
        else:
            scale = 1 if config.sampling.sampler == "flow_cps" else 2 * s**2
            log_ratio = (((after - old) ** 2).mean() - ((after - mu) ** 2).mean()) / scale
        gain = log_ratio.exp() * a
        if o.image_trust == "kl":
            gain = gain.detach() if kl > o.image_kl_bound and log_ratio * a > 0 else gain
        else:
            gain = torch.minimum(gain, log_ratio.clamp(-CLIP, CLIP).exp() * a)
        terms.append(gain)
        weights.append(1 / (t - later) if o.image_reweight else 1.0)
    return o.image_weight * sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_the_loss_is_the_formula(golden_checkpoint: Checkpoint, micro: MicroBatch, options: dict[str, Any]) -> None:
    sampling = {"sampler": options.get("sampler", "flow_sde"), "noise_level": LEVEL}
    chosen = {key: value for key, value in options.items() if key != "sampler"}
    config = validate({"objective": {"regulariser": "none", **chosen}, "sampling": sampling})
    policy = moved()
    # The loss asks the engine for a forward alone.
    engine: Any = SimpleNamespace(engine=policy, module=policy)
    bound = config.objective.image_kl_bound if config.objective.image_trust == "kl" else CLIP
    updater = Updater(engine, golden_checkpoint.policy, config, bound, 1)
    loss, stats, _ = updater._loss(micro, updater._old(micro), *updater.references([[micro]])[0], len(ADVANTAGES), 1.0)
    output: PolicyOutput = policy(micro.packed)
    with torch.no_grad():
        reference = golden_checkpoint.policy(micro.packed).logprobs
    wanted = -torch.stack(
        [
            text_term(config.objective, micro, output.logprobs, reference, c)
            + image_term(config, micro, output.velocity, c)
            for c in range(micro.chains)
        ]
    ).mean()
    close(loss, wanted, atol=1e-5)
    found, expected = (
        torch.autograd.grad(value, [policy.get_parameter(name) for name in PARAMETERS]) for value in (loss, wanted)
    )
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)
    assert 0 < stats["sum/image/clipped"] < stats["count/window"], "some steps are bounded and some are not"
    bounded = chosen.keys() & {"text_clip_low"}
    assert 0 < stats["sum/text/clipped"] < stats["count/token"] or not bounded
