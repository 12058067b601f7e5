"""The joint update of a composed policy on a real DeepSpeed engine, with all weights and with adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chains import SHIFT, changed, make_engine, micro_batch, snapshot, train_config

from common import lora
from common.config import Lora, Model
from common.policy import OpenPolicy, open_policy
from common.recipe import validate
from common.types import Chain, Prompt, TextSegment
from learner.refl import ReFLUpdater
from learner.update import Updater, lay_out
from rollout.denoiser import Denoiser

pytestmark = pytest.mark.usefixtures("one_rank")

ADVANTAGES = [1.2, -0.7, 0.4]


def make_chains(opened: OpenPolicy, think: bool = True) -> list[Chain]:
    """Chains whose answers and final prompts differ in length; on-policy."""
    rng, chat, denoiser = np.random.default_rng(0), opened.chat, Denoiser(opened, 32, 32, SHIFT, 0.7)
    prompts = [chat.prompt_ids(text, think=think) for text in ("a ring", "two rings", "a ring beside a cross")]
    answers = [
        [*rng.integers(0, 256, n).tolist(), 259, *rng.integers(64, 90, n).tolist()] if think else [] for n in (3, 9, 5)
    ]
    contexts = [chat.context_ids(p, a) for p, a in zip(prompts, answers, strict=True)]
    images = denoiser.draw(contexts, [0, 1, 2], [(i, 2) for i in range(3)], 6)
    with torch.no_grad():
        logprobs = opened.policy.token_logprobs([p + a for p, a in zip(prompts, answers, strict=True)])
    return [
        Chain(
            (
                TextSegment(np.array(p), np.array(a), logp[len(p) - 1 :].numpy(), False, "", 0),
                image,
            ),
            seed,
        )
        for seed, (p, a, logp, image) in enumerate(zip(prompts, answers, logprobs, images, strict=True))
    ]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"])
def test_first_update_has_ratio_one_and_distance_zero_and_trains_what_it_should(
    tiny_models: Path, family: str, adapters: bool
) -> None:
    model = Model(path=str(tiny_models / "qwen2"), pipeline=str(tiny_models / family))
    opened = open_policy(model)
    chains, policy = make_chains(opened), opened.policy
    if adapters:
        lora.add_adapters(policy, Lora(rank=4))
    reference = lora.reference_of(policy) if adapters else open_policy(model, frozen=None).policy
    before = snapshot(policy)
    seen: list[dict[str, float]] = []

    class Watched(Updater):
        def _stats(self, *args: object) -> dict[str, float]:
            seen.append(super()._stats(*args))  # type: ignore[arg-type]
            return seen[-1]

    updater = Watched(make_engine(policy, lr=1e-3), reference, train_config(epochs=2), 1.0, 1)
    updater.run([[micro_batch(opened, chains, ADVANTAGES)]], [3])
    first, second = seen
    assert first["sum/text/ratio"] == first["count/token"] == sum(len(chain.text.ids) for chain in chains)
    assert first["sum/image/ratio"] == first["count/window"] == 6
    assert first["sum/image/log_ratio_abs"] == first["sum/image/velocity_mse"] == 0.0
    # What the rollout recorded differs by rounding alone.
    assert first["sum/text/logprob_diff"] / first["count/token"] < 1e-5
    assert first["sum/image/velocity_diff"] / first["count/chain"] < 1e-5
    assert second["sum/image/log_ratio_abs"] > 0 and second["sum/image/velocity_mse"] > 0
    moved, trained = changed(policy, before), {n for pairs in policy.parameter_groups().values() for n, _ in pairs}
    assert moved <= trained
    assert {name.partition(".")[0] for name in moved} == {"reasoner", "transformer"}
    assert all("lora_" in name for name in trained) == adapters
    # The last block's text stream of some transformers leads nowhere; all else moves.
    assert len(moved) > 0.85 * len(trained)


@pytest.mark.parametrize("algorithm", ["unigrpo", "refl"])
def test_where_nobody_reasons_or_the_text_is_left_alone_the_transformer_is_trained(
    tiny_models: Path, algorithm: str
) -> None:
    refl = algorithm == "refl"
    opened = open_policy(Model(path=str(tiny_models / "qwen2"), pipeline=str(tiny_models / "flux")))
    chains, before = make_chains(opened, think=refl), snapshot(opened.policy)
    asked = Prompt("p", "", {"tag": "counting", "include": [{"class": "ring", "count": 3}], "exclude": []})
    micro = lay_out(chains, ADVANTAGES, [1.0] * 3, opened, 0, "cpu", [asked] * 3)
    config = validate(
        {
            "algorithm": algorithm,
            "sampling": {"think": refl},
            "objective": {"text_weight": 0, "regulariser": "none"},
            "rewards": [{"name": "shapes_learned"}],
        }
    )
    parts = make_engine(opened.policy, lr=1e-3), None, config, 1.0, 1
    sums = (ReFLUpdater(opened, *parts) if refl else Updater(*parts)).run([[micro]], [3])
    assert sums["count/token"] == sum(len(chain.text.ids) for chain in chains) and (sums["count/token"] > 0) == refl
    assert sums["sum/grad_norm/reasoning"] == 0 < sums["sum/grad_norm/denoising"]
    moved = changed(opened.policy, before)
    assert moved and {name.partition(".")[0] for name in moved} == {"transformer"}


def test_recomputed_activations_give_the_same_gradients(tiny_models: Path) -> None:
    model = Model(path=str(tiny_models / "llama"), pipeline=str(tiny_models / "qwen_image"))
    gradients = []
    for recompute in (False, True):
        opened = open_policy(model)
        if recompute:
            opened.policy.recompute_activations()
        batch = micro_batch(opened, make_chains(opened), ADVANTAGES).packed
        output = opened.policy(batch)
        (output.logprobs.mean() + output.velocity.square().mean()).backward()
        gradients.append({n: p.grad for n, p in opened.policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
