"""What a run recovers from beside its pools: a group that was lost with its node, a learner that was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from ray.exceptions import ObjectLostError

from common.events import event
from common.runtime import one_line
from common.transport import LostWeightsError
from deploy.session import EvaluationSession, Session, last_checkpoint
from learner.group import LostLearnerError
from rollout.batch import Batch

log = logging.getLogger(__name__)
MAX_TRIES = 5
T = TypeVar("T")


class Recovery:
    """Rebuilds a lost learner from the last whole checkpoint, inside the same job. Replicas, scorers and trackers stay;
    what was logged since that checkpoint is forgotten and comes again."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tries, self._furthest = 0, -1

    def stepped(self, step: int) -> None:
        """A step was done. The run gets on if it was not done before: what is lost at the same step each time must
        come to an end."""
        if step > self._furthest:
            self._tries, self._furthest = 0, step

    def after(self, error: LostLearnerError | LostWeightsError) -> int:
        """Rebuilds; the step to go on from. The error itself if the learner, or what it published, was lost too often
        in a row; ConfigError if no checkpoint is whole any more."""
        while True:
            self._tries += 1
            if self._tries > MAX_TRIES:
                raise error
            log.warning("%s; the learner is rebuilt from the last checkpoint", error)
            event("learner_lost", reason=one_line(error))
            try:
                return self._back()
            except LostLearnerError as again:
                error = again

    def _back(self) -> int:
        session = self._session
        session.rollout.cancel()
        found = last_checkpoint(session.run, session.config.checkpoints.every)
        path, step = (found[0], int(found[1]["step"])) if found else (None, 0)
        session.progress.phase(f"the learner was lost; it goes on from step {step}")
        session.learner.rebuild(path)
        session.run.clear_partial(session.run.rollouts)
        session.learner.wait_ready()
        session.learner.check_sees(session.run.path)
        session.trackers.rewind(step)
        event("learner_ready", step=step)
        return step


def redoing_lost(session: EvaluationSession, batch: Batch, read: Callable[[], T]) -> T:
    """The result of something that reads a batch's groups. When groups turn out to be lost with their node, they are
    generated again, from the same seeds and by the weights that the replicas hold, and read once more."""
    for _ in range(MAX_TRIES):
        try:
            return read()
        except ObjectLostError:
            session.rollout.redo(batch)
    return read()
