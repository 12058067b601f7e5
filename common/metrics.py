"""The numbers a run reports, and the places they go: metrics.jsonl, TensorBoard, W&B and Ray's metrics."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from common.config import ConfigError, TrainConfig
from common.rundir import RunDirectory

log = logging.getLogger(__name__)

METRICS: dict[str, str] = {
    "step": "Training step, counted from 0.",
    "reward/mean": "Mean weighted reward of the step's scored chains.",
    "reward/std": "Standard deviation of the reward over the step's scored chains.",
    "reward/refilled_groups": "Groups replaced because all their chains scored alike (data.refill_rounds).",
    "reward/zero_variance_groups": "Groups whose rewards are all equal and which therefore teach nothing.",
    "reward/masked_chains": "Chains that could not be scored and are left out of the update.",
    "reward/nonfinite": "Scores that were NaN or infinite; those chains are left out of the update.",
    "reward/<scorer>": "Mean reward of one scorer before its weight; <scorer>/NAME is one of its components.",
    "reward/queued_groups": "Groups that wait for a reward actor, counted once per reward.",
    "reward/actors": "Reward actors that serve.",
    "reward/restarts": "Reward actors that died or hung and were restarted, since the driver started.",
    "advantage/abs_mean": "Mean absolute advantage after clipping.",
    "text/ratio_mean": "Mean importance ratio of the reasoning tokens.",
    "text/clip_fraction": "Share of reasoning tokens whose ratio is clipped.",
    "text/logprob_diff_rollout": "Mean absolute difference of token log-probs between learner and rollout, in nats.",
    "text/tokens_mean": "Mean reasoning length in tokens, EOS included.",
    "text/truncated": "Share of reasonings cut at sampling.max_tokens.",
    "text/entropy": "Mean entropy of the reasoning's next-token distribution, in nats.",
    "image/ratio_mean": "Mean importance ratio of the denoising steps.",
    "image/log_ratio_abs": "Mean absolute log ratio of the denoising steps.",
    "image/clip_fraction": "Share of denoising steps whose ratio is clipped.",
    "image/kl_old": "KL of the window's steps to the old policy's, mean over latent dimensions.",
    "image/velocity_mse": "Mean squared distance of the velocity to the reference model's.",
    "image/velocity_diff_rollout": "Mean absolute difference of velocities between learner and rollout.",
    "grad_norm/reasoning": "Gradient norm of the reasoning expert before clipping.",
    "grad_norm/denoising": "Gradient norm of the denoising expert before clipping.",
    "weights/version": "Weight version that the replicas hold after the step.",
    "weights/sync_s": "Seconds from publishing a version to the last replica's acknowledgement.",
    "rollout/images_per_s": "Images generated per second of rollout.",
    "rollout/staleness": "Mean number of versions that the step's groups were behind its update.",
    "rollout/stale_groups": "Groups left out of the update because they were further behind than max_staleness.",
    "rollout/replicas": "Rollout replicas that serve.",
    "rollout/replicas_wanted": "Rollout replicas that serve or are being started.",
    "rollout/starting": "Rollout replicas that wait for room, are being built, or were lost and are built again.",
    "rollout/idle": "Rollout replicas without a call.",
    "rollout/generating": "Rollout replicas that make groups.",
    "rollout/loading": "Rollout replicas that load weights.",
    "rollout/leaving": "Rollout replicas that finish what they have and then leave.",
    "rollout/restarts": "Rollout replicas lost, hung or wrong, and restarted, since the driver started.",
    "rollout/rerun_groups": "Groups generated again after a fault, since the driver started.",
    "rollout/continued_groups": "Groups that went on after an update amid their reasoning, since the driver started.",
    "rollout/queued_groups": "Groups that wait for a rollout replica.",
    "rollout/tokens_per_s": "Reasoning tokens generated per second of rollout.",
    "time/rollout_s": "Seconds the step waited for rollouts.",
    "time/reasoning_s": "Seconds of the step a replica reasoned, on average.",
    "time/drawing_s": "Seconds of the step a replica drew, on average.",
    "time/reward_s": "Seconds the step waited for rewards.",
    "time/update_s": "Seconds of the learner's update.",
    "time/update_math_s": "Seconds of the update's forward and backward passes and optimizer steps, on its first rank.",
    "time/sync_s": "Seconds the step waited for weights to be gathered, packed and published.",
    "time/step_s": "Seconds of the whole step.",
    "time/overhead_fraction": "Share of the step that is not model mathematics: generation and the update's passes.",
    "learner/rebuilds": "Times the learner was rebuilt from a checkpoint since the driver started.",
    "checkpoint/failures": "Checkpoints that could not be written since the driver started; the one before stays.",
    "loss/nonfinite": "Updates left out because a loss or gradient was NaN or infinite.",
}

Scalars = dict[str, float]


def describe(key: str) -> str | None:
    """The one-line description of a metric, None for an undocumented one. Any other reward/... is a scorer's."""
    return METRICS.get(key) or (METRICS["reward/<scorer>"] if re.fullmatch(r"reward/[^<>]+", key) else None)


class Trackers:
    """Sends each step's metrics to everything `config.recording.trackers` names, to metrics.jsonl and to Ray.

    `resume_step` is the first step that is going to be logged (again): rows and TensorBoard points from it on are
    dropped. None drops nothing. Missing and non-finite values are null in metrics.jsonl and left out elsewhere.
    """

    def __init__(self, config: TrainConfig, run: RunDirectory, resume_step: int | None = None) -> None:
        self._run = run
        if resume_step is not None:
            run.rewind(resume_step)
        self._sinks: list[_Sink] = []
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        for name in config.recording.trackers:
            self._sinks.append(
                _TensorBoard(run, resume_step) if name == "tensorboard" else _WandB(run, config.model_dump(mode="json"))
            )
        # A process that never imported Ray cannot have initialised it; the import costs a second.
        if (ray := sys.modules.get("ray")) and ray.is_initialized():
            self._sinks.append(_RayGauges(run.name))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records one step. Values are numbers, numpy or not, or None."""
        self._run.append_metrics({"step": step} | {k: v for k, v in metrics.items() if k != "step"})
        finite = {
            key: float(value)
            for key, value in metrics.items()
            if key != "step" and value is not None and math.isfinite(value)
        }
        for sink in self._sinks:
            sink.log(step, finite)

    def rewind(self, step: int) -> None:
        """Forgets `step` and later: the run goes back to a checkpoint and logs them again."""
        self._run.rewind(step)
        for sink in self._sinks:
            sink.rewind(step)

    def images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Sends PNGs by tag to TensorBoard, where they are scrolled through by step."""
        for sink in self._sinks:
            if isinstance(sink, _TensorBoard):
                sink.images(step, images)

    def watch(self, read: Callable[[], Scalars], every_s: float = 5.0) -> None:
        """Also sends what `read` returns to Ray's metrics, between steps: queues and replicas matter most while a step
        hangs. Until `close`."""

        def look() -> None:
            while not self._closed.wait(every_s):
                for gauges in [sink for sink in self._sinks if isinstance(sink, _RayGauges)]:
                    gauges.set(read())

        self._watcher = threading.Thread(target=look, name="metrics", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Flushes and closes every tracker."""
        self._closed.set()
        if self._watcher:
            self._watcher.join(timeout=30)
        for sink in self._sinks:
            sink.close()
        self._sinks = []


class _Sink(Protocol):
    def log(self, step: int, metrics: Scalars) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """TensorBoard's own event writer; torch.utils.tensorboard would import torch into the driver."""

    def __init__(self, run: RunDirectory, resume_step: int | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._open = partial(EventFileWriter, str(run.tensorboard))
        self._writer: Any = self._open()
        if resume_step is not None:
            self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # TensorBoard discards what it has read so far from this step on.
        restart = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=restart))

    def log(self, step: int, metrics: Scalars) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, [Summary.Value(tag=key, simple_value=value) for key, value in metrics.items()])

    def images(self, step: int, images: Mapping[str, bytes]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for tag, png in images.items():
            width, height = struct.unpack(">II", png[16:24])  # PNG's first chunk
            image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
            values.append(Summary.Value(tag=tag, image=image))
        self._add(step, values)

    def _add(self, step: int, values: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        """A line that a full disk costs is missing; a writer that failed never writes again, so another takes over."""
        try:
            self._writer = self._writer or self._open()
            self._writer.add_event(event)
            self._writer.flush()
        except OSError as error:  # recovered from: a full disk must not end the run
            log.warning("TensorBoard's events could not be written: %s", error)
            self.close()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        with suppress(OSError):
            if writer:
                writer.close()


class _WandB:
    """One W&B run per run directory; wandb.json keeps its id, so that a resumed run continues it."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "config: recording.trackers names wandb, which is not installed; "
                "run `uv pip install wandb` or take it out of the list"
            ) from error
        stored = run.path / "wandb.json"
        if not stored.exists():
            run.write_json(stored.name, {"id": uuid.uuid4().hex[:8]})
        self._wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "unigrpo"),
            name=run.name,
            id=json.loads(stored.read_text())["id"],
            resume="allow",
            dir=str(run.path),
            config=dict(config),
        )
        # W&B's own counter never goes back; with `step` as the axis a resumed run may repeat steps.
        self._wandb.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Scalars) -> None:
        self._wandb.log({"step": step} | metrics)

    def rewind(self, step: int) -> None:
        """W&B keeps both; the axis is the step."""

    def close(self) -> None:
        self._wandb.finish()


class _RayGauges:
    """Gauges such as unigrpo_reward_mean with the tag run; Prometheus sees them with Ray's prefix ray_."""

    def __init__(self, run_name: str) -> None:
        self._run = run_name
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: Scalars) -> None:
        self.set({"step": float(step)} | metrics)

    def set(self, metrics: Scalars) -> None:
        from ray.util.metrics import Gauge

        for key, value in metrics.items():
            name, tags = gauge(key)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, describe(key) or key, tag_keys=("run", *tags))
            self._gauges[name].set(value, tags={"run": self._run, **tags})

    def rewind(self, step: int) -> None:
        """A gauge shows the last value."""

    def close(self) -> None:
        self._gauges = {}


def gauge(key: str) -> tuple[str, dict[str, str]]:
    """Name and tags of a metric's gauge: reward/mean -> unigrpo_reward_mean; the rewards of all scorers are one gauge,
    so that a query need not know their names: reward/clip_score -> unigrpo_reward_of_scorer, scorer=clip_score."""
    if key not in METRICS and describe(key):
        return "unigrpo_reward_of_scorer", {"scorer": key.removeprefix("reward/")}
    return "unigrpo_" + re.sub(r"\W", "_", key), {}
