"""Supervised fine-tuning: next-token loss on the reasoning, flow matching on the image, one joint update.

The image of an example is noised several times per step and every copy attends to the same text, so the text is read
once: the same packed forward as in the RL update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.bagel.policy import BagelPolicy, PolicyOutput, pack_batch
from common.sft_config import SFTConfig
from learner.engine import Engine


@dataclass(frozen=True)
class Examples:
    """A supervised set held in memory.

    texts: token lists (prompt chunk + reasoning, closed by <|im_end|>); scored: (first, end) of each reasoning;
    latents [E, N, D] fp32 clean latent tokens; grid (rows, cols).
    """

    texts: list[list[int]]
    scored: list[tuple[int, int]]
    latents: Tensor
    grid: tuple[int, int]


def learning_rate_factor(step: int, config: SFTConfig) -> float:
    """Linear warm-up, then cosine to 2 %."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def losses(output: PolicyOutput, target: Tensor, text_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total, next-token, flow-matching): mean negative log-prob per token, 0 where no text is learned; mean squared
    velocity error."""
    text = -output.logprobs.sum() / max(1, len(output.logprobs))
    image = F.mse_loss(output.velocity, target)
    return text_weight * text + image, text, image


def train(
    engine: Engine,
    examples: Examples,
    config: SFTConfig,
    seed: int,
    report: Callable[[dict[str, float]], None],
    save: Callable[[int, dict[str, Tensor]], None],
) -> None:
    """Runs all steps on this rank; examples are this rank's own. `save(step, averaged weights)` is called every
    `save_every` steps and at the end; the weights are the same on every rank."""
    policy = engine.module
    assert isinstance(policy, BagelPolicy)
    random = np.random.default_rng(seed)
    noise = torch.Generator().manual_seed(seed)
    averaged = {k: v.detach().float().clone() for k, v in policy.state_dict().items()}
    started = time.monotonic()
    for step in range(config.steps):
        engine.set_learning_rates(learning_rate_factor(step, config), dict.fromkeys(engine.names, config.lr))
        chosen = random.choice(len(examples.texts), config.batch, replace=False)
        owner = torch.arange(config.batch).repeat_interleave(config.copies)
        clean = examples.latents[torch.from_numpy(chosen)][owner]
        t = torch.rand(len(owner), generator=noise)
        t = config.shift * t / (1 + (config.shift - 1) * t)
        eps = torch.randn(clean.shape, generator=noise)
        clean, t, eps, owner = (tensor.to(policy.device) for tensor in (clean, t, eps, owner))
        x_t = (1 - t[:, None, None]) * clean + t[:, None, None] * eps
        batch = pack_batch(
            [examples.texts[i] for i in chosen], [examples.scored[i] for i in chosen], x_t, t, owner, examples.grid
        )
        total, text, image = losses(engine.engine(batch), eps - clean, config.text_weight)
        engine.backward(total, last=True)
        norms = engine.step()
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, tensor in policy.state_dict().items():
                averaged[name].lerp_(tensor.float(), 1 - decay)
        report(
            {
                "step": step + 1,
                "loss/text": text.item(),
                "loss/image": image.item(),
                "skipped": float(norms is None),
                "time/elapsed_s": time.monotonic() - started,
            }
        )
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save(step + 1, averaged)
