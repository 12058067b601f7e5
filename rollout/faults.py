"""When faults of replicas are more than bad luck: what ends a run, and what has the learner publish again."""

from __future__ import annotations

import time
from collections.abc import Sequence

from common.config import ConfigError
from common.transport import LostWeightsError, Publication
from rollout.batch import RolloutError
from rollout.replica import Replica

MIN_FAULTS = 3  # in a row
FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.4, 60.0  # until another replica is tried in the place of one that cannot be built


class Faults:
    """Counts, in a row, replicas that cannot be built or hold other weights than they were sent, and loads of a version
    that no node has any more. As many as there are replicas, at least MIN_FAULTS, are too many, unless others work on:
    one bad node is no bad pool."""

    def __init__(self) -> None:
        self.add_from = 0.0
        """When (time.monotonic) the next replica may be added."""
        self._faults = self._misses = 0

    def worked(self) -> None:
        """A replica has made groups."""
        self._faults = 0

    def loaded(self) -> None:
        """A replica has loaded the weights, or there are others."""
        self._misses = 0

    def fault(
        self, error: ConfigError | RolloutError, replicas: Sequence[Replica]
    ) -> ConfigError | RolloutError | None:
        """One more; the error that ends the run, if it is one too many."""
        self._faults += 1
        backoff = FIRST_BACKOFF_S * 2 ** min(self._faults - 1, 10)
        self.add_from = time.monotonic() + min(MOST_BACKOFF_S, backoff)
        if self._bearable(self._faults, replicas) or any(replica.serving and replica.holds for replica in replicas):
            return None
        return type(error)(f"{self._faults} faults of rollout replicas in a row; the last one: {error}")

    def missing(self, weights: Publication, replicas: Sequence[Replica]) -> LostWeightsError | None:
        """A replica could not load the current weights, whose bytes died with the learner's node; the error for whoever
        waits for groups, if no replica has them either: a rebuilt learner publishes again."""
        self._misses += 1
        if self._bearable(self._misses, replicas) or any(replica.holds is weights for replica in replicas):
            return None
        return LostWeightsError(
            f"weights version {weights.manifest.version} is lost with the learner's node, and no replica holds it"
        )

    @staticmethod
    def _bearable(number: int, replicas: Sequence[Replica]) -> bool:
        return number < max(MIN_FAULTS, len(replicas))
