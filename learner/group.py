"""The learner as the training loop sees it: all ranks, called together."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from common.actors import Placement, last_line, not_built, options
from common.config import ConfigError, TrainConfig
from common.events import event
from common.timeline import Span
from common.transport import Publication
from common.transport.collective import CollectivePublication
from common.transport.object_store import ObjectStorePublication
from common.types import NonFiniteError, SelfTestError, WeightManifest
from learner.actor import LearnerRank
from learner.rendezvous import rendezvous
from learner.self_test import verdict

log = logging.getLogger(__name__)
MOST_WRITING = 8  # halves of learner.deadline_s that a checkpoint may take


class LearnerError(RuntimeError):
    """An update or collective that did not finish."""


class LostLearnerError(LearnerError):
    """A rank died, hung or failed, and with it what the ranks hold together: `rebuild` from a checkpoint."""


class LearnerGroup:
    """Starts one actor per rank and calls them in step."""

    def __init__(self, config: TrainConfig, resume: Path | None = None) -> None:
        self.config = config
        self.rebuilds = self.failed_saves = 0
        self._recording: tuple[Path, ray.ObjectRef] | None = None
        self._order = threading.Lock()
        self._start(resume)

    def _start(self, resume: Path | None) -> None:
        config, resources = self.config, self.config.learner
        self.tested = not config.self_test
        self._room = Placement(resources.asked, resources.ranks)
        self._published: WeightManifest | None = None
        self._buffers: dict[int, ray.ObjectRef] = {}
        self._sending: list[ray.ObjectRef] = []
        self._address = rendezvous.options(scheduling_strategy=self._room.slot()).remote()
        self.ranks: list[Any] = [
            ray.remote(LearnerRank)
            .options(
                name=f"{config.run_name}-learner-{rank}",
                scheduling_strategy=self._room.slot(rank),
                **options(resources),
            )
            .remote(config, rank, self._address, str(resume) if resume else None)
            for rank in range(resources.ranks)
        ]

    def _all(self, method: str, *args: Any) -> list[Any]:
        """What every rank returned."""
        return self._outcomes(self._call(method, *args), method)

    def _call(self, method: str, *args: Any, **how: Any) -> list[Any]:
        """Begins a call on every rank. Calls that meet in collectives reach all ranks in the same order, whichever
        thread makes them."""
        with self._order:
            return [getattr(rank, method).options(**how).remote(*args) for rank in self.ranks]

    def _outcomes(self, refs: list[ray.ObjectRef], method: str) -> list[Any]:
        """Waits for one call per rank. The first failure is heard at once: the other ranks may wait for the failed one
        in a collective. ObjectLostError if a group is on no node any more; ConfigError if that is why a rank cannot be
        built; LostLearnerError for everything else."""
        waiting, deadline = refs, time.monotonic() + self.config.learner.deadline_s
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = ", ".join(str(rank) for rank, ref in enumerate(refs) if ref in waiting)
                raise LostLearnerError(
                    f"learner {method}: rank {late} did not finish within {self.config.learner.deadline_s:.0f} s "
                    "(learner.deadline_s)"
                )
            try:
                ray.get(done)
            except ObjectLostError:
                raise
            except RayError as error:
                raise not_built(error) or LostLearnerError(f"learner {method}: {last_line(error)}") from error
        return ray.get(refs)

    def rebuild(self, resume: Path | None) -> None:
        """Ends what is left of the ranks and starts all of them anew: from a checkpoint, or from the beginning."""
        self.close()
        self.rebuilds += 1
        self._start(resume)

    def wait_ready(self) -> int:
        """Blocks until all ranks are built; the version they hold. ConfigError if rank 0's machine has no free port,
        or if the cluster has no room within the deadline; LostLearnerError if they are not built within another."""
        try:
            ray.get(self._address, timeout=self.config.learner.deadline_s)
        except RayTaskError as error:
            raise error.cause from error
        except GetTimeoutError as error:
            waited = f"{self.config.learner.deadline_s:.0f} s (learner.deadline_s)"
            if not self._room.granted():
                raise self._room.missing(f"{self.config.learner.ranks} learner ranks", waited) from error
            raise LostLearnerError(f"rank 0's node started no process within {waited}") from error
        except RayError as error:
            raise LostLearnerError(f"rank 0's node was lost while the learner started: {error}") from error
        return int(self._all("ping")[0])

    def check_sees(self, directory: Path) -> None:
        """ConfigError if rank 0, which writes checkpoints and rollouts, does not find what the driver writes there."""
        # A name that was never used: a directory of the same run's name may well lie on that node's own disk.
        token = directory / f"shared-{uuid.uuid4().hex}.partial"
        token.touch()
        try:
            node = self._all("misses", str(token))[0]
        finally:
            token.unlink()
        if node:
            raise ConfigError(
                f"{directory} on the learner's node {node} is not the directory that the driver writes to; give a "
                "runs_dir that all nodes share, or set UNIGRPO_HOME to a directory that they share"
            )

    def parameters(self) -> str:
        """The table of which parameter is trained in which group, as rank 0 has it."""
        return str(self._outcomes([self.ranks[0].parameters.remote()], "parameters")[0])

    def update(self, step: int, groups: list[ray.ObjectRef], rewards: NDArray[np.float64]) -> dict[str, float]:
        """One joint update; rewards [B, G]. ObjectLostError, with nothing changed, if a group is on no node any more;
        SelfTestError before the first one if rollout and learner do not agree; NonFiniteError if it went wrong and
        on_nonfinite is stop."""
        if not self.tested:
            self._self_test(step, groups)
        self._all("take", groups, rewards)
        metrics: dict[str, float] = self._all("update", step)[0]
        if metrics.pop("checkpoint/failed", 0.0):
            self._heed(self._all("saved")[0])
        if metrics["loss/nonfinite"] and self.config.on_nonfinite == "stop":
            raise NonFiniteError(
                f"step {step}: the gradient is NaN or infinite; the weights were left as they were before it. "
                "Lower the learning rates, or set on_nonfinite=skip to drop such updates"
            )
        return metrics

    def _self_test(self, step: int, groups: list[ray.ObjectRef]) -> None:
        self._all("take_for_test", groups)
        found = [comparison for comparison in self._all("self_test") if comparison is not None]
        dtypes = (self.config.rollout.dtype, self.config.learner.dtype)
        for comparison in found:
            if problem := verdict(comparison, "bfloat16" if "bfloat16" in dtypes else "float32"):
                raise SelfTestError(
                    f"the self-test before the update of step {step} failed: {problem}. Nothing was trained; "
                    "self_test=false trains all the same"
                )
        # Chains of older weights prove nothing; the next step's may be of these.
        self.tested = bool(found)

    def publish(self) -> Publication:
        """The current weights, for the pool's `sync`; the driver never opens them. LostLearnerError if a bucket takes
        longer than the deadline."""
        if self.config.rollout.transport == "collective":
            manifest, address = self._all("manifest")[0]
            return CollectivePublication(manifest, address, partial(self._send, manifest.version), self._check_sending)
        streams = self._call("publish", num_returns="streaming")
        (*changed, last), *_ = [list(self._items(stream)) for stream in streams]
        manifest = self._outcomes([last], "publish")[0]
        for index, buffer in zip(manifest.changed_since(self._published), changed, strict=True):
            self._buffers[index] = buffer
        self._published = manifest
        return ObjectStorePublication(manifest, [self._buffers[index] for index in range(len(manifest.buckets))])

    def _send(self, version: int, name: str, replicas: int) -> None:
        # Whether it succeeded is heard from the replicas.
        sending = self._call("send", name, replicas, version)
        with self._order:
            self._sending += sending

    def _check_sending(self) -> None:
        """LostLearnerError if a rank died while it sent."""
        with self._order:
            done = ray.wait(self._sending, num_returns=len(self._sending), timeout=0)[0] if self._sending else []
            self._sending = [ref for ref in self._sending if ref not in done]
        for ref in done:
            try:
                ray.get(ref)
            except RayActorError as error:
                raise LostLearnerError(f"learner send: {last_line(error)}") from error
            except RayTaskError as error:  # the replicas hear of it too, and the pool has it sent again
                log.debug("a transfer failed: %s", error.cause)

    def _items(self, stream: ray.ObjectRefGenerator) -> Iterator[ray.ObjectRef]:
        wait_s = self.config.learner.deadline_s
        while ray.wait([stream], timeout=wait_s, fetch_local=False)[0]:
            try:
                yield next(stream)
            except StopIteration:
                return
        raise LostLearnerError(f"the learner did not publish its next bucket of weights within {wait_s:.0f} s")

    def record(
        self, path: Path, groups: list[ray.ObjectRef], rewards: NDArray[np.float64], by_scorer: dict[str, NDArray]
    ) -> None:
        """Has rank 0 write the groups of the last update as Parquet, in the background of the next rollout. A file that
        could not be written is a warning, at the next record or at the end."""
        self._recorded()
        self._recording = path, self.ranks[0].record.remote(str(path), groups, rewards, by_scorer)

    def _recorded(self) -> None:
        if not self._recording:
            return
        (path, written), self._recording = self._recording, None
        try:
            ray.get(written, timeout=self.config.learner.deadline_s)
        except RayError as error:  # recovered from: nothing that is trained on is lost
            event("record_failed", path=str(path), reason=last_line(error))
            log.warning("%s could not be written: %s", path, last_line(error))

    def save(
        self, directory: Path, state: dict[str, Any], in_flight: dict[int, list[ray.ObjectRef]] | None = None
    ) -> None:
        """Begins a checkpoint: returns when the state is copied; rank 0 writes it while training goes on, after the
        one before. A checkpoint that could not be written is a warning here: the one before stays whole. in_flight:
        finished groups of steps to come."""
        self._wait_written()
        self._heed(self._all("save", str(directory), state, in_flight or {})[0])
        event("checkpoint", path=str(directory))

    def restore(self, path: Path, count: int) -> list[ray.ObjectRef]:
        """The groups that a checkpoint's file of groups in flight holds, read on rank 0's node."""
        done, *groups = self.ranks[0].restore.options(num_returns=1 + count).remote(str(path))
        self._outcomes([done], "restore")
        return groups

    def saved(self) -> None:
        """Waits until the last groups and the last checkpoint are written. LearnerError if that checkpoint could not
        be."""
        self._recorded()
        self._wait_written()
        if problem := self._heed(self._all("saved")[0]):
            raise LearnerError(f"the last checkpoint could not be written: {problem}")

    def _wait_written(self) -> None:
        """A slow disk is no lost learner: rank 0 answers while it writes. LearnerError if the disk hangs."""
        deadline_s = self.config.learner.deadline_s
        for waited in range(MOST_WRITING):
            if self._outcomes([self.ranks[0].written.remote(deadline_s / 2)], "written")[0]:
                return
            log.warning(
                "a checkpoint is still being written after %.0f s; the run waits", (waited + 1) * deadline_s / 2
            )
        raise LearnerError(
            f"a checkpoint was not written within {MOST_WRITING * deadline_s / 2:.0f} s ({MOST_WRITING / 2:g} times "
            "learner.deadline_s); does the disk of runs_dir still answer?"
        )

    def _heed(self, problem: str | None) -> str | None:
        if problem:
            self.failed_saves += 1
            event("checkpoint_failed", reason=problem)
            log.warning("a checkpoint could not be written: %s; the one before stays", problem)
        return problem

    def metrics(self) -> dict[str, float]:
        """Rebuilds of the learner and checkpoints that could not be written, since the driver started."""
        return {"learner/rebuilds": float(self.rebuilds), "checkpoint/failures": float(self.failed_saves)}

    def spans(self) -> list[Span]:
        """What the ranks have done since they took their groups."""
        return [span for spans in self._all("spans") for span in spans]

    def close(self) -> None:
        """Ends every rank."""
        for rank in self.ranks:
            ray.kill(rank)
        self._room.give_back()
