"""Dynamic sampling (DAPO): groups whose chains all scored alike teach nothing and make way for other prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.advantage import decoupled_rewards
from common.config import TrainConfig
from deploy.requests import refill_requests
from deploy.scoring import tickets
from deploy.session import Session
from rewards.pool import Scored
from rollout.batch import Batch


def flat_groups(rewards: NDArray[np.float64]) -> list[int]:
    """Rows of rewards [B, G] (NaN where unscored) whose scores are all equal; one without any score is none of them."""
    return [place for place, row in enumerate(rewards) if np.unique(row[np.isfinite(row)]).size == 1]


def training_rewards(config: TrainConfig, scored: Scored) -> NDArray[np.float64]:
    """[B, G]: what advantages are made of. The weighted sum, or that of rewards normalised within their groups."""
    if config.objective.reward_normalisation == "none":
        return scored.total
    weights = {scorer.name: scorer.weight for scorer in config.rewards if scorer.weight}
    return decoupled_rewards(scored.total, scored.by_scorer, weights)


def refill(session: Session, step: int, batch: Batch, scored: Scored) -> tuple[Scored, int]:
    """Replaces a step's flat groups in the batch, at most data.refill_rounds times; scores of all groups, and how many
    were replaced. What is flat still after the last round stays and is masked."""
    config, replaced = session.config, 0
    tried = {request.prompt.id for request in batch.requests}
    for turn in range(1, config.data.refill_rounds + 1):
        flat = flat_groups(training_rewards(config, scored))
        requests = refill_requests(config, session.order, step, turn, flat, tried)
        if not requests:
            break
        tried |= {request.prompt.id for request in requests.values()}
        fresh = session.rollout.submit(list(requests.values()), first=True)
        scored = scored.replaced(list(requests), session.rewards.finish(tickets(session, fresh)))
        batch.adopt(list(requests), fresh)
        replaced += len(requests)
    return scored, replaced
