"""The update of chains that are stale, guided, cut short, without reasoning, or sampled by another engine."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import make_chains, micro_batch, train_config
from golden_numbers import close
from watched import (
    ADVANTAGES,
    COUNT,
    Watched,
    replace_text,
    same_gradients,
    without_reasoning,
)

from common import flow
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.config import Cfg, TrainConfig
from common.types import Chain
from learner.update import metrics_of

pytestmark = pytest.mark.usefixtures("one_rank")


def test_stale_chains_keep_what_their_behaviour_policy_recorded(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """A chain of version 0 in an update of version 1: the ratio is against the recorded numbers."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
        texts = [golden_checkpoint.chat.context_ids(c.text.prompt_ids.tolist(), c.text.ids.tolist()) for c in chains]
        starts = [len(c.text.prompt_ids) - 1 for c in chains]
        new = [
            part[start : start + len(c.text.ids)]
            for part, start, c in zip(policy.token_logprobs(texts), starts, chains, strict=True)
        ]
    wanted = sum((n - torch.tensor(c.text.logprobs)).exp().sum().item() for n, c in zip(new, chains, strict=True))
    updater = Watched(policy, train_config(regulariser="none"), lr=0.0)
    updater.run([[micro_batch(golden_checkpoint, chains, ADVANTAGES, version=1)]], [COUNT])
    stats = updater.losses[0]
    close(stats["sum/text/ratio"], wanted, rtol=1e-4)
    assert abs(stats["sum/text/ratio"] / stats["count/token"] - 1) > 1e-3
    assert stats["sum/image/log_ratio_abs"] > 0


def test_fresh_chains_beside_stale_ones_are_on_policy(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """Their ratios are exactly 1, in the same forward; those of the stale ones are not."""
    fresh = [
        Chain((replace(c.text, version=1), replace(c.image, version=1)), c.seed) if i % 2 else c
        for i, c in enumerate(chains)
    ]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    micro = micro_batch(golden_checkpoint, fresh, ADVANTAGES, version=1)
    assert micro.on_policy.tolist() == [False, True] * 3
    updater = Watched(policy, train_config(regulariser="none"), lr=0.0)
    old = updater._old(micro)
    output = updater.forward(policy, micro)
    moved = (output.logprobs != old.logprobs)[: len(micro.token_owner)]
    for chain in range(COUNT):
        assert moved[micro.token_owner == chain].any() == (chain % 2 == 0)
        images = slice(chain * micro.window, (chain + 1) * micro.window)
        assert torch.equal(output.velocity[images], old.velocity[images]) == bool(chain % 2)
    updater.run([[micro]], [COUNT])
    alone = Watched(copy.deepcopy(policy), train_config(regulariser="none"), lr=0.0)
    for weight, part in ((1, fresh[1::2]), (0, fresh[::2])):
        alone.run([[micro_batch(golden_checkpoint, part, ADVANTAGES[weight::2], version=1)]], [COUNT])
    wanted = {name: alone.gradients[0][name] + alone.gradients[1][name] for name in alone.gradients[0]}
    same_gradients(updater.gradients[0], wanted)


def test_text_alone_trains_without_noise(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    quiet = train_config(image_weight=0.0, regulariser="none")
    quiet = quiet.model_copy(update={"sampling": quiet.sampling.model_copy(update={"noise_level": 0.0})})
    found = []
    for config in (quiet, train_config(image_weight=0.0, regulariser="none")):
        updater = Watched(copy.deepcopy(policy), config, lr=0.0)
        metrics = metrics_of(updater.run([[micro_batch(golden_checkpoint, chains, ADVANTAGES)]], [COUNT]))
        assert metrics["image/ratio_mean"] == 1 and metrics["image/kl_old"] == metrics["loss/nonfinite"] == 0
        found.append(updater.gradients[0])
    quiet_gradients, noisy = found
    for name, gradient in noisy.items():
        close(quiet_gradients[name], gradient, atol=1e-6)
    assert quiet_gradients["language_model.lm_head.weight"].any() and not quiet_gradients["llm2vae.weight"].any()


def test_truncated_reasoning_is_left_out_of_the_kl(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    cut = [replace_text(chain, finished=i not in (1, 4)) for i, chain in enumerate(chains)]
    for masked in (True, False):
        config = train_config(text_kl=1.0, mask_truncated=masked, image_weight=0.0, regulariser="none")
        updater = Watched(copy.deepcopy(policy), config, reference=True, lr=0.0)
        with torch.no_grad():
            updater.policy.get_parameter("language_model.lm_head.weight").mul_(1.5)
        # Without an advantage the KL alone has a gradient.
        updater.run([[micro_batch(golden_checkpoint, [cut[1], cut[4]], [0.0, 0.0])]], [2])
        assert updater.gradients[0]["language_model.lm_head.weight"].any() != masked


@pytest.mark.parametrize("image_scale", [1.0, 2.0])
def test_guided_rollouts_are_guided_in_the_update(
    golden_checkpoint: Checkpoint, policy: BagelPolicy, image_scale: float
) -> None:
    """CFG in training, the ablation: the packed forward gives the velocity that the rollout drew with, and all three
    branches are differentiated."""
    cfg = Cfg(text_scale=3.0, image_scale=image_scale, interval=(0.7, 1.0), renorm="channel")
    guidance = golden_checkpoint.guidance(["a ring", "two stars", "a ring", "a blue square"], "think first", cfg)
    guided = make_chains(golden_checkpoint, 4, guidance=guidance)
    plain = make_chains(golden_checkpoint, 4)
    times = np.concatenate([chain.image.t for chain in guided])
    assert (times > 0.7).any()
    assert (times <= 0.7).any()
    updater = Watched(policy, train_config(text_weight=0.0), reference=True, lr=0.0)
    micro = micro_batch(golden_checkpoint, guided, ADVANTAGES[:4], guidance=guidance)
    metrics = metrics_of(updater.run([[micro]], [4]))
    assert metrics["image/velocity_diff_rollout"] < 1e-4
    assert metrics["image/ratio_mean"] == 1.0
    assert metrics["image/velocity_mse"] == 0.0
    unguided = Watched(copy.deepcopy(policy), train_config(text_weight=0.0), lr=0.0)
    stats = metrics_of(unguided.run([[micro_batch(golden_checkpoint, guided, ADVANTAGES[:4])]], [4]))
    assert stats["image/velocity_diff_rollout"] > 100 * metrics["image/velocity_diff_rollout"]
    assert not np.allclose(guided[0].image.v_old[0], plain[0].image.v_old[0], atol=1e-2)

    name = "llm2vae.weight"
    parameter, step, wanted = policy.get_parameter(name), 1e-2, updater.gradients[0][name]

    def loss() -> float:
        with torch.no_grad():
            output = policy(micro.packed)
            move = flow.sde_step(micro.packed.t, micro.t_next, TrainConfig().sampling.noise_level)
            mean_old = flow.mean_of(move, micro.packed.x_t, micro.v_old)
            mean = flow.mean_of(move, micro.packed.x_t, output.velocity)
            log_ratio = flow.ratio_norm_log(micro.x_next, mean_old, mean, move.std).view(micro.shape)
            return -(log_ratio.exp() * micro.advantage[:, None]).mean().item()

    direction = wanted / wanted.norm()
    with torch.no_grad():
        parameter.add_(step * direction)
        above = loss()
        parameter.sub_(2 * step * direction)
        below = loss()
    assert (above - below) / (2 * step) == pytest.approx(wanted.norm().item(), rel=0.05)


def test_chains_without_reasoning_train_the_image_half(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """Alone, and beside chains that reasoned: no token is scored, and the text metrics stay neutral."""
    bare = without_reasoning(chains)
    updater = Watched(policy, train_config(text_weight=0.0), reference=True, lr=0.0)
    sums = updater.run([[micro_batch(golden_checkpoint, bare, ADVANTAGES, version=1)]], [COUNT])
    assert sums["count/token"] == 0
    assert metrics_of(sums)["text/ratio_mean"] == 1.0
    assert updater.gradients[0]["llm2vae.weight"].abs().max() > 0
    assert not updater.gradients[0]["language_model.lm_head.weight"].any()
    mixed = updater.run([[micro_batch(golden_checkpoint, [*bare[:3], *chains[3:]], ADVANTAGES)]], [COUNT])
    assert mixed["count/token"] == sum(len(chain.text.ids) for chain in chains[3:])


@pytest.mark.parametrize("aggregation", ["chain_mean", "token_mean", "constant_length"])
def test_truncated_reasoning_is_left_out_whatever_the_aggregation(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy, aggregation: str
) -> None:
    """Its text gets no gradient and no share of the token count, in one micro-batch or in several."""
    cut = [replace_text(chain, finished=i not in (1, 4)) for i, chain in enumerate(chains)]
    lengths = [len(chain.text.ids) for chain in chains]
    kept = [i for i in range(COUNT) if i not in (1, 4)]
    divisor = {
        "chain_mean": lambda i: lengths[i],
        "token_mean": lambda i: sum(lengths[k] for k in kept) / COUNT,
        "constant_length": lambda i: TrainConfig().sampling.max_tokens,
    }[aggregation]
    for i in kept:
        text = golden_checkpoint.chat.context_ids(chains[i].text.prompt_ids.tolist(), chains[i].text.ids.tolist())
        first = len(chains[i].text.prompt_ids) - 1
        logp = policy.token_logprobs([text])[0][first:][: lengths[i]].sum() / divisor(i)
        (-ADVANTAGES[i] * logp / COUNT).backward()
    wanted = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    policy.zero_grad()
    config = train_config(text_aggregation=aggregation, mask_truncated=True, image_weight=0.0, regulariser="none")
    updater = Watched(policy, config, lr=0.0)
    parts = [slice(0, 2), slice(2, 6)]
    updater.run([[micro_batch(golden_checkpoint, cut[part], ADVANTAGES[part]) for part in parts]], [COUNT])
    same_gradients({name: updater.gradients[0][name] for name in wanted}, wanted)


def test_importance_weights_correct_for_the_engine_that_sampled(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy
) -> None:
    """Where vLLM's log-probs lie log 1.5 below the learner's, every token counts 1.5 times, and at a cap 1.2 times."""
    shifted = [replace_text(chain, logprobs=chain.text.logprobs - math.log(1.5)) for chain in chains]
    gradients = []
    for cap in (0.0, 2.0, 1.2):
        config = train_config(text_importance_cap=cap, image_weight=0.0, regulariser="none")
        updater = Watched(copy.deepcopy(policy), config, lr=0.0)
        updater.run([[micro_batch(golden_checkpoint, shifted, ADVANTAGES)]], [COUNT])
        gradients.append(updater.gradients[0]["language_model.lm_head.weight"])
    scale = gradients[0].abs().max().item()
    close(gradients[1], 1.5 * gradients[0], atol=1e-4 * scale, rtol=1e-3)
    close(gradients[2], 1.2 * gradients[0], atol=1e-4 * scale, rtol=1e-3)
