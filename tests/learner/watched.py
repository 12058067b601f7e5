"""An updater whose gradients can be looked at, what they should be, and chains that are out of the ordinary."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from chains import make_engine
from golden_numbers import close

from common import flow
from common.advantage import group_advantages
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.config import TrainConfig
from common.types import Chain
from learner.update import MicroBatch, Updater, lay_out, share_out

COUNT = 6
ADVANTAGES = [1.2, -0.7, 0.4, -1.6, 0.05, 2.0]
CLIP = 1e-4


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
    image_grad: bool = True,
) -> dict[str, torch.Tensor]:
    """Gradient of the mean over chains of -A (mean log p of tokens + mean over steps of s log p of the step), one
    chain after the other and without any ratio. At ratio 1, RatioNorm's gradient is s times the log-prob's.
    image_grad: whether the image's part of it reaches the reasoning half."""
    policy.zero_grad()
    reached = [
        parameter
        for role, pairs in policy.parameter_groups().items()
        for _, parameter in pairs
        if image_grad or role == "denoising"
    ]
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
        (-advantage * text_weight * logp / len(chains)).backward()
        (-advantage * image_weight * torch.cat(steps).mean() / len(chains)).backward(inputs=reached)
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        close(found[name], gradient, atol=2e-4 * scale, rtol=1e-3)


def replace_text(chain: Chain, **changes: object) -> Chain:
    return Chain((replace(chain.text, **changes), chain.image), chain.seed)  # type: ignore[arg-type]


def without_reasoning(chains: list[Chain]) -> list[Chain]:
    return [
        Chain((replace(chain.text, ids=chain.text.ids[:0], logprobs=chain.text.logprobs[:0]), chain.image), chain.seed)
        for chain in chains
    ]


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
