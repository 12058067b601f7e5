"""The self-test passes on agreeing sides, and says which side to look at when they do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chains import POINTS, make_chains, micro_batch

from common.bagel.checkpoint import Checkpoint
from common.config import Sampling, TrainConfig
from common.recipe import validate
from common.types import Chain, SelfTestError
from learner.group import LearnerGroup
from learner.self_test import Comparison, Seen, compare, verdict

SAMPLING = Sampling(points=POINTS, noise_level=0.7)


@pytest.fixture(scope="module")
def chains(golden_checkpoint: Checkpoint) -> list[Chain]:
    return make_chains(golden_checkpoint, 4)


def found(checkpoint: Checkpoint, chains: list[Chain], sampling: Sampling = SAMPLING) -> Comparison:
    seen = []
    for piece in (chains[:1], chains[1:]):  # uneven, as the last of a group may be
        micro = micro_batch(checkpoint, piece, [0.0] * len(piece))
        again = checkpoint.policy(micro.packed)
        with torch.no_grad():
            seen.append(Seen(micro, checkpoint.policy(micro.packed), again, again))
    with torch.no_grad():
        return compare(seen, sampling)


def text(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Chain], Chain]:
    return lambda c: Chain((replace(c.text, logprobs=change(c.text.logprobs)), c.image), c.seed)


def image(**change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Chain], Chain]:
    def changed(c: Chain) -> Chain:
        arrays: dict[str, Any] = {name: one(getattr(c.image, name)) for name, one in change.items()}
        return Chain((c.text, replace(c.image, **arrays)), c.seed)

    return changed


def test_sides_that_agree(golden_checkpoint: Checkpoint, chains: list[Chain]) -> None:
    comparison = found(golden_checkpoint, chains)
    assert comparison.text_max < 1e-4
    assert comparison.image < 1e-4
    assert comparison.on_schedule
    assert verdict(comparison, "float32") is None
    assert verdict(comparison, "bfloat16") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (text(lambda p: p + 0.01), "the images agree, so look at vLLM's side"),
        (text(lambda p: p * math.nan), "look at vLLM's side"),
        (image(v_old=lambda v: v * 1.05), "the text agrees, so look at the denoiser's side"),
        (image(v_old=lambda v: v * math.inf), "the images overflow: look at sampling.noise_level"),
        (image(t=lambda t: t * 0.99), "times are not on the learner's schedule"),
        (image(t_next=lambda t: t - 0.01), "times are not on the learner's schedule"),
    ],
)
def test_what_differs_names_the_side(
    golden_checkpoint: Checkpoint, chains: list[Chain], change: Callable[[Chain], Chain], words: str
) -> None:
    problem = verdict(found(golden_checkpoint, [change(chain) for chain in chains]), "float32")
    assert problem is not None
    assert words in problem


def test_other_weights_differ_in_both_halves(golden_checkpoint: Checkpoint, chains: list[Chain]) -> None:
    both = [image(v_old=lambda v: v * 1.05)(text(lambda p: p + 0.1)(chain)) for chain in chains]
    assert "both halves differ" in (verdict(found(golden_checkpoint, both), "float32") or "")


@pytest.mark.parametrize("other", [{"noise_level": 0.6}, {"sampler": "dance"}])
def test_another_strength_of_noise_is_seen(
    golden_checkpoint: Checkpoint, chains: list[Chain], other: dict[str, Any]
) -> None:
    problem = verdict(found(golden_checkpoint, chains, Sampling(points=POINTS, **other)), "float32")
    assert "noise is" in (problem or "")


def test_chains_without_tokens_or_noise(golden_checkpoint: Checkpoint, chains: list[Chain]) -> None:
    bare = [text(lambda p: p[:0])(chain) for chain in chains]
    bare = [Chain((replace(c.text, ids=c.text.ids[:0]), c.image), c.seed) for c in bare]
    # Drawn after reasoning, so only the text is looked at.
    assert found(golden_checkpoint, bare).text_max == 0.0
    assert found(golden_checkpoint, chains, Sampling(points=POINTS, noise_level=0.0)).image == 0.0


def test_the_learner_must_agree_with_itself(golden_checkpoint: Checkpoint, chains: list[Chain]) -> None:
    """Exactly: then the first ratios are 1, and the distance to the reference begins at 0."""
    good = found(golden_checkpoint, chains)
    assert good.again == good.reference == 0
    assert "two passes of the learner" in (verdict(replace(good, again=1e-9), "bfloat16") or "")
    moved = copy.deepcopy(golden_checkpoint.policy)
    with torch.no_grad():
        moved.get_parameter("llm2vae.weight").mul_(1.001)
        micro = micro_batch(golden_checkpoint, chains, [0.0] * len(chains))
        output = golden_checkpoint.policy(micro.packed)
        comparison = compare([Seen(micro, output, output, moved(micro.packed))], SAMPLING)
    assert comparison.reference > 0 == comparison.again
    assert "differs from the reference" in (verdict(comparison, "float32") or "")
    assert verdict(replace(comparison, reference=math.nan), "float32") is not None


class Ranks(LearnerGroup):
    """A learner group whose ranks answer at once: what `update` asks of them, in order."""

    def __init__(self, config: TrainConfig, answers: list[Comparison | None]) -> None:
        self.config, self.tested, self.answers, self.asked = config, not config.self_test, answers, []  # type: ignore[var-annotated]

    def _all(self, method: str, *args: Any) -> list[Any]:
        self.asked.append(method)
        return self.answers if method == "self_test" else [{"loss/nonfinite": 0.0}]


def test_nothing_is_trained_before_the_sides_agree() -> None:
    good, bad = Comparison(1e-6, 1e-5, 1e-5, True, 0.3), Comparison(0.3, 2.0, 1e-5, True, 0.3)
    config = validate({"rollout": {"dtype": "float32"}, "learner": {"dtype": "float32"}})
    rewards = np.zeros((1, 2))
    failing = Ranks(config, [good, bad])
    with pytest.raises(SelfTestError, match=r"before the update of step 7 failed: text .* look at vLLM's side"):
        failing.update(7, [], rewards)
    assert failing.asked == ["take_for_test", "self_test"]
    passing = Ranks(config, [good, good])
    for _ in range(2):
        passing.update(0, [], rewards)
    assert passing.asked == ["take_for_test", "self_test", "take", "update", "take", "update"]
    stale = Ranks(config, [None, None])
    for _ in range(2):
        stale.update(0, [], rewards)
    assert stale.asked.count("self_test") == 2, "chains of other weights prove nothing"
    off = Ranks(validate({"self_test": False}), [bad])
    off.update(0, [], rewards)
    assert off.asked == ["take", "update"]


def test_bounds_are_wider_in_bfloat16() -> None:
    rounding = Comparison(0.02, 0.3, 0.05, True, 1.0)
    assert verdict(rounding, "bfloat16") is None
    assert verdict(rounding, "float32") is not None
