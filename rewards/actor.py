"""The reward actor: one scorer in a process of its own."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.actors import building
from common.types import Group, Rewards
from rewards.scorer import build


class RewardActor:
    """Scores groups, one at a time. The pool makes it a Ray actor; `__init__` builds all, so a restart is complete."""

    @building
    def __init__(self, scorer_name: str, options: Mapping[str, Any]) -> None:
        """ConfigError, with the name of the node, for an unknown scorer, bad options or missing files."""
        self._name = scorer_name
        self._scorer = build(scorer_name, options)
        self._start = uuid.uuid4().hex

    def ping(self) -> str:
        """Answers when the actor is up: which start of it this is."""
        return self._start

    def score(self, group: Group) -> Rewards:
        """Scores of the last image of each of the group's G chains; NaN or infinite ones are counted and become NaN,
        and so do the components of these and of the unscorable.
        ValueError if the scorer broke its contract: values of another shape than [G]."""
        images = np.stack([chain.image.pixels for chain in group.chains])
        output = self._scorer.score(images, [group.prompt] * len(group.chains))
        values = self._column("values", output.values, len(group.chains))
        unscorable = np.zeros(len(values), bool)
        unscorable[list(output.unscorable)] = True
        nonfinite = ~np.isfinite(values) & ~unscorable
        components = {name: self._column(name, column, len(values)) for name, column in output.components.items()}
        # What cannot be judged is wrong in no column: evaluations count by components.
        for column in (values, *components.values()):
            column[unscorable | nonfinite] = np.nan
        return Rewards(self._name, values, components, int(nonfinite.sum()))

    def _column(self, name: str, column: NDArray[np.floating], size: int) -> NDArray[np.float32]:
        array = np.array(column, np.float32)
        if array.shape != (size,):
            raise ValueError(f"reward {self._name}: {name} has the shape {list(array.shape)}; give [{size}]")
        return array
