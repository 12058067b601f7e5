"""What the replicas are asked for: one request per prompt, with seeds and a window that depend on the step alone."""

from __future__ import annotations

from common.config import TrainConfig
from common.prompts import PromptOrder
from common.types import Prompt, RolloutRequest, chain_seed
from common.window import sample_window

# Evaluation and training draw from disjoint streams: no training step has this number.
EVALUATION_STREAM = 2**31


def training_requests(config: TrainConfig, order: PromptOrder, step: int) -> list[RolloutRequest]:
    """One group per prompt of the step; the SDE window is drawn once per group."""
    sampling = config.sampling
    return [
        RolloutRequest(
            prompt,
            step,
            tuple(chain_seed(config.seed, step, place, g) for g in range(config.data.group_size)),
            sample_window(
                chain_seed(config.seed, step, place, config.data.group_size),
                sampling.window_size,
                sampling.window_range,
                sampling.points - 1,
            ),
            sampling.points,
        )
        for place, prompt in enumerate(order.batch(step))
    ]


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
