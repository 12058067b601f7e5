"""Scores of a batch, begun group by group while others are still being made."""

from __future__ import annotations

from deploy.session import EvaluationSession
from rewards.pool import Ticket
from rollout.batch import Batch


def tickets(session: EvaluationSession, batch: Batch) -> list[Ticket]:
    """Waits for a batch's groups and has each scored as it arrives; in the order of its requests. Errors as of
    `Batch.arrivals`."""
    # Scoring has begun, but for groups that were scored before and are again.
    begun = (
        (place, batch.begun.pop(place, None) or session.rewards.start(ref, batch.size(place)))
        for place, ref in batch.arrivals(session.config.rollout.patience_s)
    )
    return [ticket for _, ticket in sorted(begun, key=lambda pair: pair[0])]
