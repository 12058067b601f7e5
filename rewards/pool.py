"""All rewards of a run: groups go in as object references, a matrix of scores comes out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray

from common.config import Reward
from common.types import Group, NonFiniteError, Rewards
from rewards.replicas import Outcome, Replicas
from rewards.scorer import check

MOST_BARREN = 3  # batches in a row at which a scorer failed altogether


@dataclass(frozen=True)
class Scored:
    """Scores of B groups of G chains.

    total [B, G] float64: the weighted sum, NaN where a scorer of non-zero weight has no score; by_scorer [B, G] fp32 by
    reward name; components [B, G] fp32 by "reward/column"; errors: chains without a score of some scorer; nonfinite:
    scores that were NaN or infinite; seconds: from the first group's start to the last score.
    """

    total: NDArray[np.float64]
    by_scorer: Mapping[str, NDArray[np.float32]]
    components: Mapping[str, NDArray[np.float32]]
    errors: int
    nonfinite: int
    seconds: float

    def replaced(self, places: Sequence[int], other: Scored) -> Scored:
        """With the rows of `other`, in its order, in the place of some of these; errors and times add up."""

        def put(rows: NDArray[Any], new: NDArray[Any] | None) -> NDArray[Any]:
            rows = rows.copy()
            rows[list(places)] = np.nan if new is None else new
            return rows

        return Scored(
            put(self.total, other.total),
            {name: put(rows, other.by_scorer.get(name)) for name, rows in self.by_scorer.items()},
            {name: put(rows, other.components.get(name)) for name, rows in self.components.items()},
            self.errors + other.errors,
            self.nonfinite + other.nonfinite,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Ticket:
    """A group that is being scored: its number of chains and what each scorer owes."""

    size: int
    started: float
    outcomes: tuple[Future[Outcome], ...]


class RewardPool:
    """The actors of every scorer, supervised from the driver, which handles references and scores only."""

    def __init__(
        self, scorers: tuple[Reward, ...], run_name: str = "", on_nonfinite: Literal["stop", "skip"] = "stop"
    ) -> None:
        """Starts the actors, named after the run, and waits until all are up. ConfigError for an unknown reward, bad
        options or missing files, or if the cluster has no room; RuntimeError if an actor is not built in time."""
        check(scorers)
        self._scorers, self._on_nonfinite = scorers, on_nonfinite
        self._replicas: list[Replicas] = []
        self._barren: Counter[str] = Counter()
        try:
            for scorer in scorers:
                self._replicas.append(Replicas(scorer, run_name))
            for replicas in self._replicas:
                replicas.wait()
        except BaseException:
            self.close()
            raise

    def start(self, group: ray.ObjectRef[Group], size: int) -> Ticket:
        """Begins to score a group of `size` chains; returns at once. A group that is still being made is waited for
        by the actor that is to score it, so start groups as they are finished."""
        return Ticket(size, time.monotonic(), tuple(replicas.submit(group) for replicas in self._replicas))

    def finish(self, tickets: Sequence[Ticket]) -> Scored:
        """Waits for the scores of groups of equal size, in their order. ValueError for none or unequal ones;
        ObjectLostError if a group was lost with its node; NonFiniteError if a score was NaN or infinite and
        on_nonfinite is stop; RuntimeError if a scorer has lost all its actors for good, gives no score within its time,
        or, if it is trained on, failed at every group of the last MOST_BARREN calls; ConfigError if it lost them for
        want of room."""
        sizes = sorted({ticket.size for ticket in tickets})
        if len(sizes) != 1:
            raise ValueError(f"tickets are of groups with {sizes} chains; give at least one, all of the same size")
        size = sizes[0]
        self._wait(tickets)
        outcomes = [[future.result() for future in ticket.outcomes] for ticket in tickets]
        total = np.zeros((len(tickets), size))
        failed = np.zeros(total.shape, bool)
        nonfinite = 0
        by_scorer: dict[str, NDArray[np.float32]] = {}
        components: dict[str, NDArray[np.float32]] = {}
        for scorer, column in zip(self._scorers, zip(*outcomes, strict=True), strict=True):
            rewards = [outcome.rewards for outcome in column]
            self._heed(scorer, column)
            if wrong := [len(r.values) for r in rewards if r is not None and len(r.values) != size]:
                raise ValueError(f"a group was started with size {size} but has {wrong[0]} chains; correct size")
            nonfinite += self._nonfinite(scorer, rewards)
            values = _stack([r and r.values for r in rewards], size)
            by_scorer[scorer.name] = values
            failed |= np.isnan(values)
            if scorer.weight:
                total += scorer.weight * values.astype(np.float64)
            for name in _component_names(rewards):
                components[f"{scorer.name}/{name}"] = _stack([r and r.components.get(name) for r in rewards], size)
        last = max(outcome.finished for row in outcomes for outcome in row)
        seconds = last - min(ticket.started for ticket in tickets)
        return Scored(total, by_scorer, components, int(failed.sum()), nonfinite, seconds)

    def _wait(self, tickets: Sequence[Ticket]) -> None:
        for scorer, replicas, owed in zip(
            self._scorers, self._replicas, zip(*(ticket.outcomes for ticket in tickets), strict=True), strict=True
        ):
            waiting: set[Future[Outcome]] = set(owed)
            while waiting:
                done, waiting = wait(waiting, replicas.patience_s, FIRST_COMPLETED)
                if not done:
                    raise RuntimeError(
                        f"reward {scorer.name}: no group was scored for {replicas.patience_s:.0f} s (all tries of "
                        f"rewards.deadline_s, with a restart after each); {len(waiting)} of {len(tickets)} are missing"
                    )

    def _heed(self, scorer: Reward, outcomes: Sequence[Outcome]) -> None:
        """A run whose steps all go unscored would come to its end without having learned. A scorer that is only
        recorded stops none."""
        if not scorer.weight:
            return
        failed = all(outcome.rewards is None for outcome in outcomes)
        self._barren[scorer.name] = self._barren[scorer.name] + 1 if failed else 0
        if self._barren[scorer.name] >= MOST_BARREN:
            raise RuntimeError(
                f"reward {scorer.name} failed at every group, {MOST_BARREN} times in a row; the last one: "
                f"{outcomes[-1].problem}"
            )

    def _nonfinite(self, scorer: Reward, rewards: Iterable[Rewards | None]) -> int:
        count = sum(r.nonfinite for r in rewards if r is not None)
        if count and self._on_nonfinite == "stop":
            raise NonFiniteError(
                f"reward {scorer.name}: {count} scores are NaN or infinite. Let the scorer name images that it cannot "
                "judge in unscorable, or set on_nonfinite=skip to leave such chains out"
            )
        return count

    def metrics(self) -> dict[str, float]:
        """Queue and actors of all scorers together, now."""
        queued, actors, restarts = np.sum([replicas.state() for replicas in self._replicas], axis=0).tolist()
        return {"reward/queued_groups": queued, "reward/actors": actors, "reward/restarts": restarts}

    def close(self) -> None:
        """Ends the actors; what is not scored yet is cancelled."""
        for replicas in self._replicas:
            replicas.close()


def _component_names(rewards: Iterable[Rewards | None]) -> list[str]:
    return list(dict.fromkeys(name for r in rewards if r is not None for name in r.components))


def _stack(rows: Iterable[NDArray[np.float32] | None], size: int) -> NDArray[np.float32]:
    """Rows [G] -> [B, G] fp32; a missing row is NaN."""
    blank = np.full(size, np.nan, np.float32)
    return np.stack([blank if row is None else row for row in rows])
