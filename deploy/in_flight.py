"""The batches that replicas work on while the learner updates, and what a checkpoint keeps of them."""

from __future__ import annotations

from typing import Any

import ray

from common.config import TrainConfig
from common.records import index_groups
from common.types import RolloutRequest, RolloutStats
from deploy.requests import training_requests
from deploy.session import Session
from learner import checkpoint as run_checkpoint
from rollout.batch import Batch


class InFlight:
    """Batches of the step at hand and of the `max_staleness` steps after it.

    Of those after it a checkpoint keeps every group that is finished, and a run that goes on from there trains on it as
    it is: with the log-probs and velocities of the weights that made it. What was still being made is generated again,
    from the same seeds, by the checkpoint's weights.
    """

    def __init__(self, session: Session, first: int) -> None:
        """first: the step to begin with; if it is not 0, that of a checkpoint."""
        self._session, self._checkpoint = session, session.run.checkpoint(first)
        self._batches: dict[int, Batch] = {}

    def take(self, step: int) -> Batch:
        """The batch of the next step; those after it are begun."""
        config, newest = self._session.config, max(self._batches, default=step - 1)
        for later in range(newest + 1, min(step + config.max_staleness, config.steps - 1) + 1):
            requests = training_requests(config, self._session.order, later)
            kept = self._kept(later, requests)
            # Scored as they come, though their step may not have begun.
            self._batches[later] = self._session.rollout.submit(requests, kept, self._session.rewards.start)
        return self._batches.pop(step)

    def finished(self) -> dict[int, list[ray.ObjectRef]]:
        """Groups of later steps that are there already, by step."""
        return {step: refs for step, batch in self._batches.items() if (refs := batch.refs)}

    def _kept(self, step: int, requests: list[RolloutRequest]) -> dict[int, tuple[ray.ObjectRef, RolloutStats]]:
        """What the checkpoint holds of these requests, by their place."""
        path = run_checkpoint.in_flight_file(self._checkpoint, step)
        if not path.exists():
            return {}
        if run_checkpoint.read_state(self._checkpoint)["conditions"] != conditions(self._session.config):
            return {}
        places = {(request.prompt.id, request.seeds): place for place, request in enumerate(requests)}
        index = index_groups(path)
        refs = self._session.learner.restore(path, len(index))
        return {
            places[prompt, seeds]: (ref, stats)
            for (prompt, seeds, stats), ref in zip(index, refs, strict=True)
            if (prompt, seeds) in places
        }


def conditions(config: TrainConfig) -> dict[str, Any]:
    """Under which a group is made; one made under others is not kept."""
    return config.model_dump(mode="json", include={"model", "data", "sampling", "max_staleness"})
