"""The joint update on a real DeepSpeed engine: its first step is exact, and what must not touch weights does not."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import WINDOW, changed, make_chains, make_engine, micro_batch, snapshot, train_config
from golden_numbers import CHECKPOINT, close
from hypothesis import given, settings
from hypothesis import strategies as st

from common import flow
from common.advantage import group_advantages
from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.config import Cfg, TrainConfig
from common.types import Chain
from learner.engine import Engine
from learner.reference import HostReference
from learner.update import MicroBatch, Updater, lay_out, metrics_of, share_out

pytestmark = pytest.mark.usefixtures("one_rank")

COUNT = 6
ADVANTAGES = [1.2, -0.7, 0.4, -1.6, 0.05, 2.0]
CLIP = 1e-4


@pytest.fixture(scope="module")
def chains(golden_checkpoint: Checkpoint) -> list[Chain]:
    return make_chains(golden_checkpoint, COUNT)


@pytest.fixture
def policy() -> BagelPolicy:
    return store.load(CHECKPOINT).policy


class Watched(Updater):
    """An updater that keeps, per optimizer step, the full gradients and the statistics of the forwards before it."""

    def __init__(self, policy: BagelPolicy, config: TrainConfig, reference: bool = False, **engine: object) -> None:
        frozen = copy.deepcopy(policy).eval() if reference else None
        super().__init__(make_engine(policy, **engine), frozen, config, CLIP, 1)  # type: ignore[arg-type]
        self.policy = policy
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[dict[str, float]] = [{}]

    def _step(self) -> dict[str, float]:
        from deepspeed.utils import safe_get_full_grad

        trained = [(n, p) for n, p in self.policy.named_parameters() if p.requires_grad]
        self.gradients.append({name: safe_get_full_grad(p).clone() for name, p in trained})
        self.losses.append({})
        return super()._step()

    def _stats(self, *args: object) -> dict[str, float]:
        stats = super()._stats(*args)  # type: ignore[arg-type]
        for key, value in stats.items():
            self.losses[-1][key] = self.losses[-1].get(key, 0.0) + value
        return stats


def reinforce(
    policy: BagelPolicy,
    checkpoint: Checkpoint,
    chains: list[Chain],
    advantages: list[float],
    image_weight: float = 1.0,
    text_weight: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Gradient of the mean over chains of -A (mean log p of tokens + mean over steps of s log p of the step), one
    chain after the other and without any ratio. At ratio 1, RatioNorm's gradient is s times the log-prob's."""
    policy.zero_grad()
    for chain, advantage in zip(chains, advantages, strict=True):
        prompt, ids = chain.text.prompt_ids.tolist(), chain.text.ids.tolist()
        text = checkpoint.chat.context_ids(prompt, ids)
        logp = policy.token_logprobs([text])[0][len(prompt) - 1 :][: len(ids)].mean()
        context, image = policy.prefill([text]), chain.image
        steps = []
        for k in range(len(image.t)):
            x, x_next = torch.tensor(image.x_t[k])[None], torch.tensor(image.x_next[k])[None]
            t, t_next = torch.tensor(image.t[[k]]), torch.tensor(image.t_next[[k]])
            move = flow.sde_step(t, t_next, 0.7)
            mean = flow.mean_of(move, x, policy.velocity(x, t, context, image.grid))
            steps.append(move.std * flow.step_log_prob(x_next, mean, move.std))
        objective = text_weight * logp + image_weight * torch.cat(steps).mean()
        (-advantage * objective / len(chains)).backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        close(found[name], gradient, atol=2e-4 * scale, rtol=1e-3)


# --- dealing chains out ---------------------------------------------------------------------------------------------


@given(
    mask=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=12),
    ranks=st.integers(1, 4),
    minibatches=st.integers(1, 3),
    micro=st.integers(1, 7),
)
@settings(max_examples=150, deadline=None)
def test_every_contributing_chain_is_dealt_exactly_once(
    mask: list[list[bool]], ranks: int, minibatches: int, micro: int
) -> None:
    array = np.array(mask)
    shares = [share_out(array, rank, ranks, minibatches, micro) for rank in range(ranks)]
    dealt = [entry for share in shares for mini in share.pieces for piece in mini for entry in piece]
    assert all(weight in (0.0, 1.0) for *_, weight in dealt)
    assert Counter((b, g) for b, g, weight in dealt if weight) == Counter(zip(*np.nonzero(array), strict=True))
    assert all(array[b, g] for b, g, _ in dealt), "a filler is a chain that has an advantage, too"
    for share in shares:
        assert share.total == shares[0].total
        assert len(share.pieces) == minibatches
        # Every micro-batch is a collective: a rank with fewer of them would hang the others.
        assert [len(mini) for mini in share.pieces] == [len(mini) for mini in shares[0].pieces]
        assert all(1 <= len(piece) <= micro for mini in share.pieces for piece in mini)
    assert sum(shares[0].total) == array.sum()
    per_minibatch = [sum(w for s in shares for piece in s.pieces[m] for *_, w in piece) for m in range(minibatches)]
    assert per_minibatch == shares[0].total
    assert max(shares[0].total) - min(shares[0].total) <= 1


def test_a_filler_has_no_weight() -> None:
    mask = np.array([[True, False], [False, False]])
    assert share_out(mask, 0, 2, 1, 4).pieces == [[[(0, 0, 1.0)]]]
    assert share_out(mask, 1, 2, 1, 4).pieces == [[[(0, 0, 0.0)]]]


# --- the first update -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("epochs", "policy_forwards"), [(1, 2), (2, 2 + 4)])
@pytest.mark.parametrize("on_host", [False, True])
def test_nothing_is_computed_twice(
    golden_checkpoint: Checkpoint,
    chains: list[Chain],
    policy: BagelPolicy,
    epochs: int,
    policy_forwards: int,
    on_host: bool,
) -> None:
    """One optimizer step needs no pass of the old policy, and no number of steps a second one of the reference."""
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


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_first_gradient_is_that_of_reinforce(
    golden_checkpoint: Checkpoint, chains: list[Chain], policy: BagelPolicy, zero_stage: int
) -> None:
    wanted = reinforce(policy, golden_checkpoint, chains, ADVANTAGES, image_weight=0.5, text_weight=2.0)
    updater = Watched(
        policy, train_config(regulariser="none", image_weight=0.5, text_weight=2.0), lr=0.0, zero_stage=zero_stage
    )
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
    """Two passes over two parts: four steps, each with the gradient of its part alone."""
    wanted = [reinforce(policy, golden_checkpoint, chains[i : i + 3], ADVANTAGES[i : i + 3]) for i in (0, 3)]
    updater = Watched(policy, train_config(regulariser="none", epochs=2, minibatches=2), lr=0.0)
    parts = [[micro_batch(golden_checkpoint, chains[i : i + 3], ADVANTAGES[i : i + 3])] for i in (0, 3)]
    sums = updater.run(parts, [3, 3])
    assert sums["count/step"] == updater.engine.steps == 4
    for found, one in zip(updater.gradients, wanted * 2, strict=True):
        same_gradients(found, one)


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


def without_reasoning(chains: list[Chain]) -> list[Chain]:
    return [
        Chain((replace(chain.text, ids=chain.text.ids[:0], logprobs=chain.text.logprobs[:0]), chain.image), chain.seed)
        for chain in chains
    ]


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


def replace_text(chain: Chain, **changes: object) -> Chain:
    return Chain((replace(chain.text, **changes), chain.image), chain.seed)  # type: ignore[arg-type]


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


# --- what must not change the weights -------------------------------------------------------------------------------


def minibatches_of(
    checkpoint: Checkpoint, chains: list[Chain], rewards: np.ndarray, minibatches: int = 1
) -> tuple[list[list[MicroBatch]], list[int]]:
    """What the learner's actor makes of a step, on one rank."""
    advantages = group_advantages(rewards)
    share = share_out(advantages.mask, 0, 1, minibatches, 64)
    per_group = rewards.shape[1]
    batches = [
        [
            lay_out(
                [chains[b * per_group + g] for b, g, _ in piece],
                [float(advantages.values[b, g]) for b, g, _ in piece],
                [weight for *_, weight in piece],
                checkpoint,
                0,
                "cpu",
            )
            for piece in mini
        ]
        for mini in share.pieces
    ]
    return batches, share.total


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
