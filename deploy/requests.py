"""What the replicas are asked for: one request per prompt, with seeds and a window that depend on the step alone."""

from __future__ import annotations

from collections.abc import Set

from common.config import TrainConfig
from common.prompts import PromptOrder
from common.types import Prompt, RolloutRequest, chain_seed
from common.window import sample_window, sliding_window

# Evaluation and training draw from disjoint streams: no training step has this number.
EVALUATION_STREAM = 2**31


def training_requests(config: TrainConfig, order: PromptOrder, step: int) -> list[RolloutRequest]:
    """One group per prompt of the step."""
    return [_training_request(config, prompt, step, place) for place, prompt in enumerate(order.batch(step))]


def refill_requests(
    config: TrainConfig, order: PromptOrder, step: int, turn: int, places: list[int], tried: Set[str]
) -> dict[int, RolloutRequest]:
    """Other groups for these places of a step, by place; fewer than asked for if the prompts run out. turn: from 1;
    tried: ids of the prompts that the step has had."""
    # Seeds and windows as if the step had that many prompts more: no other group has them.
    first = turn * config.data.prompts_per_step
    prompts = order.others(step, len(places), tried)
    return {
        place: _training_request(config, prompt, step, first + place)
        for place, prompt in zip(places, prompts, strict=False)
    }


def _training_request(config: TrainConfig, prompt: Prompt, step: int, place: int) -> RolloutRequest:
    size, shared = config.data.group_size, config.sampling.shared_noise
    return RolloutRequest(
        prompt,
        step,
        tuple(chain_seed(config.seed, step, place, g) for g in range(size)),
        training_window(config, step, place),
        config.sampling.points,
        config.sampling.cfg,
        chain_seed(config.seed, step, place, size + 1) if shared else None,
    )


def training_window(config: TrainConfig, step: int, place: int) -> tuple[int, int]:
    """The SDE window of a step's group: (first step, size)."""
    sampling = config.sampling
    size, span = sampling.window_size, sampling.window_range
    if sampling.window_schedule == "progressive":
        return sliding_window(step // sampling.window_interval, size, span)
    # One draw for the whole step is that of its first group.
    drawn = place if sampling.window_schedule == "group" else 0
    return sample_window(chain_seed(config.seed, step, drawn, config.data.group_size), size, span, sampling.points - 1)


def evaluation_requests(config: TrainConfig, prompts: list[Prompt]) -> list[RolloutRequest]:
    """Deterministic denoising with seeds that are the same for every checkpoint."""
    evaluation = config.evaluation
    return [
        RolloutRequest(
            prompt,
            -1,
            tuple(
                chain_seed(evaluation.seed, EVALUATION_STREAM, place, g) for g in range(evaluation.images_per_prompt)
            ),
            None,
            evaluation.points,
            evaluation.cfg,
        )
        for place, prompt in enumerate(prompts)
    ]
