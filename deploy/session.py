"""A run with its actors up: what the training loop works with."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from common.config import ConfigError, TrainConfig, in_job
from common.events import event, journal
from common.metrics import Trackers
from common.policy import directories
from common.prompts import PromptOrder
from common.recipe import load_config, to_yaml
from common.rundir import RunDirectory, make_directory, replacing
from common.runtime import check_answers, check_versions, one_line, versions
from common.types import Prompt
from deploy import timeline
from deploy.cluster import capacity, nodes
from deploy.control import Control
from deploy.evaluation import Sample
from deploy.local_ray import start_ray
from deploy.preflight import check_fits, check_inputs, check_resources, demands, local_cpus, trained_names
from deploy.progress import Progress
from learner import checkpoint as run_checkpoint
from learner.group import LearnerGroup
from rewards.pool import RewardPool
from rollout.pool import RolloutPool

log = logging.getLogger(__name__)
SHOWN_IN_LOG = 3


@dataclass(frozen=True)
class EvaluationSession:
    """A run directory, the held-out prompts, and the actors that draw and judge them."""

    config: TrainConfig
    run: RunDirectory
    heldout: list[Prompt]
    rollout: RolloutPool
    rewards: RewardPool
    progress: Progress

    @property
    def version(self) -> int:
        """The weight version that the replicas hold; 0 for the checkpoint they were built from."""
        return self.rollout.weights.manifest.version if self.rollout.weights else 0

    def show(self, step: int, samples: list[Sample]) -> None:
        """Some samples of an evaluation in the log."""
        for sample in samples[:SHOWN_IN_LOG]:
            text = f"{sample.prompt!r}: {sample.reasoning!r}, drawn with score {sample.strict:g}"
            self.progress.detail(f"  sample {text}")
        self.progress.detail(f"  images: {self.run.samples_file(step)}")


@dataclass(frozen=True)
class Session(EvaluationSession):
    """Also the training prompts, the learner, and where to begin."""

    order: PromptOrder
    learner: LearnerGroup
    trackers: Trackers
    first_step: int

    def show(self, step: int, samples: list[Sample]) -> None:
        """Also their images in TensorBoard."""
        super().show(step, samples)
        self.trackers.images(step, {f"heldout/{sample.prompt}/{sample.chain}": sample.png for sample in samples})

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """A step is done: its metrics go wherever people and machines look."""
        self.trackers.log(step, metrics)
        self.progress.update(step, metrics)
        keys = ("reward/mean", "reward/masked_chains", "weights/version", "rollout/images_per_s", "time/step_s")
        event("step", step=step, **{key: metrics.get(key) for key in keys})
        timeline.step_done(self, step)


def connect(config: TrainConfig, learner_too: bool = True, replicas: int | None = None) -> None:
    """Joins the cluster that RAY_ADDRESS (set inside a Ray job) names, or starts a local one of this machine's CPUs.
    replicas: how many are to start, where `unigrpo scale` asked for another number than the recipe."""
    wanted = demands(config, learner_too, replicas)
    check_versions()
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
    else:
        check_resources(wanted, {"CPU": local_cpus(), "GPU": float("inf")})
        # Without GPUs little is moved, and memory is scarce; with them Ray's own share of it is wanted.
        small = {} if any(demand.given.gpus for demand in wanted) else {"object_store_memory": 512 << 20}
        start_ray(local_cpus(), **small)
    check_resources(wanted, capacity())
    check_fits(wanted, nodes())


def _join(address: str) -> None:
    """ray.init for a cluster that is there. Ray itself tries a dead address for a quarter of an hour."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "3")  # tries, a second apart
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdecimal() and "/" not in host:
            check_answers(host.strip("[]"), int(port))
        ray.init(address=address, log_to_driver=False)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address} but this run cannot join a cluster there ({one_line(error)}). Give the "
            "head:port of `ray start --head`, with Python, Ray, RAY_AUTH_MODE and RAY_AUTH_TOKEN as the cluster has "
            "them, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def last_checkpoint(run: RunDirectory, every: int) -> tuple[Path, dict[str, Any]] | None:
    """Where a run goes on, and the state there; None for one that was stopped before its first checkpoint. every: steps
    between the checkpoints that it wrote until now. ConfigError if none that was written is whole any more."""
    found = run_checkpoint.newest_whole(run.checkpoints)
    if not found:
        if run_checkpoint.written(run.checkpoints):
            raise ConfigError(
                f"none of the checkpoints in {run.checkpoints} is whole; restore one, or start a new run: "
                "this one would begin at step 0"
            )
        # A checkpoint is whole by the time that the next is due, unless it failed.
        done = len(run.read_metrics())
        if every and done > 2 * every:
            raise ConfigError(
                f"{run.checkpoints} holds no checkpoint although {done} steps are done; restore one, or start a new "
                "run: this one would begin at step 0"
            )
    return found


def _resumed(config: TrainConfig, run: RunDirectory, begun: TrainConfig) -> tuple[Path | None, int]:
    """The checkpoint that a run is resumed from, and its step. begun: what the run was asked for until now. ConfigError
    as of `last_checkpoint`, or if the reference or what is trained is another than before."""
    found = last_checkpoint(run, begun.checkpoints.every)
    if not found:
        return None, 0
    checkpoint, state = found
    if run_checkpoint.identity(directories(config.model)) != state["reference"]:
        raise ConfigError(
            f"model.path {config.model.path} is not the checkpoint that {run.path} started from, so the update "
            "would be held to another reference than before; restore it, or start a new run"
        )
    _same_adapters(begun, config)
    before, now = run_checkpoint.trained(checkpoint), trained_names(config)
    if differing := sorted(before ^ now):
        was = "was trained and now is not" if differing[0] in before else "is trained now and was not before"
        raise ConfigError(
            f"{differing[0]} ({len(differing)} parameters in all) {was}; a run goes on with what it began with. Leave "
            "optimizer.frozen, optimizer.groups and learner.lora as they were, or start a new run with "
            f"model.path={checkpoint / 'policy'}"
        )
    return checkpoint, int(state["step"])


def _same_adapters(begun: TrainConfig, config: TrainConfig) -> None:
    """ConfigError for adapters that mean something else than they did: nothing in a checkpoint tells."""
    before, now = begun.learner.lora, config.learner.lora
    if not (before and now):
        return  # then other parameters are trained, which is said by name
    for field in ("rank", "alpha"):
        was, wanted = getattr(before, field), getattr(now, field)
        if was != wanted:
            raise ConfigError(
                f"learner.lora.{field} is {wanted:g} but the run's adapters were trained with {was:g}; leave it as it "
                "was, or start a new run"
            )
    if config.optimizer.frozen and config.seed != begun.seed:
        raise ConfigError(
            f"seed is {config.seed} but was {begun.seed}, from which the adapters were drawn that optimizer.frozen "
            "keeps; leave it as it was"
        )


@contextmanager
def open_session(config: TrainConfig, resume: bool = False) -> Iterator[Session]:
    """Checks everything, makes or reopens the run directory, starts the actors; ends them on the way out."""
    inputs = check_inputs(config)
    run = RunDirectory(config.directory)
    with ExitStack() as stack:
        checkpoint, first = None, 0
        if resume:
            make_directory(run.open().path, "--resume")
            stack.enter_context(run.owned())
            run.clear_partial()
            run.read_metrics(), run.read_evaluations()  # broken files are said before anything starts
            begun = load_config(str(run.config))
            checkpoint, first = _resumed(config, run, begun)
        elif run.path.exists():
            raise ConfigError(f"{run.path} exists already; give another run_name, or --resume to continue that run")
        else:
            make_directory(run.path.parent, "runs_dir")
        progress = stack.enter_context(Progress(config.steps, first))
        progress.phase("starting Ray")
        control = Control(run)
        connect(config, replicas=control.replicas)
        stack.callback(ray.shutdown)
        if not resume:
            stack.enter_context(run.create(to_yaml(config)).owned())
        stack.enter_context(_recorded(run, first))
        progress.phase(
            f"starting {control.replicas or config.rollout.replicas} rollout replicas, "
            f"{config.learner.ranks} learner ranks, {sum(s.replicas for s in config.rewards)} reward actors"
        )
        # Constructors run side by side; only then is each waited for.
        learner = LearnerGroup(config, checkpoint)
        stack.callback(learner.close)
        rollout = RolloutPool(config, control.replicas)
        stack.callback(rollout.close)
        rewards = RewardPool(config.rewards, config.run_name, config.on_nonfinite)
        stack.callback(rewards.close)
        learner.wait_ready()
        learner.check_sees(run.path)
        table = learner.parameters()
        progress.detail(table)
        rollout.wait_ready()
        control.follow(rollout)
        stack.callback(control.close)
        trackers = Trackers(config, run, first if resume else None)
        stack.callback(trackers.close)
        trackers.watch(lambda: rollout.metrics() | rewards.metrics())
        if resume:  # all is up: what it was asked for this time holds from now on
            run.configure(to_yaml(config.model_copy(update={"runs_dir": begun.runs_dir, "run_name": begun.run_name})))
        with replacing(run.parameters) as aside:
            aside.write_text(table + "\n", encoding="utf-8")
        order = PromptOrder(inputs.train, config.data.prompts_per_step, config.seed)
        yield Session(config, run, inputs.heldout, rollout, rewards, progress, order, learner, trackers, first)


@contextmanager
def open_evaluation(config: TrainConfig) -> Iterator[EvaluationSession]:
    """As `open_session` without a learner: the replicas keep the weights of the checkpoint they were built from."""
    inputs = check_inputs(config)
    run = RunDirectory(config.directory)
    make_directory(run.path.parent, "runs_dir")
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(0))
        progress.phase("starting Ray")
        connect(config, learner_too=False)
        stack.callback(ray.shutdown)
        run.create(to_yaml(config))
        stack.enter_context(_recorded(run, 0))
        progress.phase(f"starting {config.rollout.replicas} rollout replicas")
        rollout = RolloutPool(config)
        stack.callback(rollout.close)
        rewards = RewardPool(config.rewards, config.run_name, config.on_nonfinite)
        stack.callback(rewards.close)
        rollout.wait_ready()
        yield EvaluationSession(config, run, inputs.heldout, rollout, rewards, progress)


@contextmanager
def _recorded(run: RunDirectory, step: int) -> Iterator[None]:
    """Events go to the run directory and, in a job, to its log: the first begins at a step, the last says the end."""
    with journal(run.events, sys.stdout if in_job() else None):
        event("run_started", run=run.name, step=step, **versions())
        outcome, reason = "done", None
        try:
            yield
        except BaseException as error:
            outcome, reason = type(error).__name__, one_line(error)
            raise
        finally:
            event("run_ended", outcome=outcome, reason=reason)
