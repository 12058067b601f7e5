"""Groups of real chains for the learner's tests: random reasoning, drawn by the recorded checkpoint."""

from __future__ import annotations

import numpy as np
import torch

from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.config import TrainConfig
from common.policy import Guidance
from common.recipe import validate
from common.types import Chain, TextSegment
from learner.engine import Engine
from learner.update import MicroBatch, lay_out
from rollout.denoiser import Denoiser

POINTS, SHIFT, WINDOW = 7, 3.0, 3


def train_config(**objective: object) -> TrainConfig:
    """Defaults, but for the objective."""
    return validate({"objective": objective, "learner": {"dtype": "float32"}, "rollout": {"dtype": "float32"}})


def make_chains(
    checkpoint: Checkpoint, count: int, seed: int = 0, noise_level: float = 0.7, guidance: Guidance | None = None
) -> list[Chain]:
    """Chains of different lengths whose window starts at different steps; log-probs and latents are on-policy."""
    rng = np.random.default_rng(seed)
    config, chat = checkpoint.config, checkpoint.chat
    side = config.pixels_per_token
    denoiser = Denoiser(checkpoint, 2 * side, 3 * side, SHIFT, noise_level)
    vocabulary = config.llm_config.vocab_size
    prompts = [[chat.start, *rng.integers(0, vocabulary, n).tolist()] for n in rng.integers(2, 9, count)]
    answers = [[*rng.integers(0, vocabulary, n).tolist(), chat.end] for n in rng.integers(2, 12, count)]
    texts = [chat.context_ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    images = denoiser.draw(texts, list(range(count)), [(i % 3, WINDOW) for i in range(count)], POINTS, guidance)
    with torch.no_grad():
        logprobs = checkpoint.policy.token_logprobs(texts)
    chains = []
    for i, image in enumerate(images):
        first = len(prompts[i]) - 1
        text = TextSegment(
            np.array(prompts[i]),
            np.array(answers[i]),
            logprobs[i][first : first + len(answers[i])].numpy(),
            True,
            "",
            0,
        )
        chains.append(Chain((text, image), i))
    return chains


def micro_batch(
    checkpoint: Checkpoint,
    chains: list[Chain],
    advantages: list[float],
    version: int = 0,
    guidance: Guidance | None = None,
) -> MicroBatch:
    return lay_out(chains, advantages, [1.0] * len(chains), checkpoint, version, "cpu", guidance=guidance)


def make_engine(policy: BagelPolicy, *, lr: float = 1e-4, zero_stage: int = 2, dtype: str = "float32") -> Engine:
    """The learner's engine around a policy that this test alone uses, without gradient clipping."""
    return Engine(
        policy,
        {name: ([p for _, p in pairs], lr) for name, pairs in policy.parameter_groups().items() if pairs},
        zero_stage=zero_stage,
        dtype=dtype,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        grad_clip=0.0,
    )


def snapshot(policy: BagelPolicy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def changed(policy: BagelPolicy, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
