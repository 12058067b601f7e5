"""A run with its actors up: what the training loop works with."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray.exceptions import AuthenticationError

from common.config import ConfigError, TrainConfig, resolve_path, to_yaml
from common.metrics import Trackers
from common.prompts import PromptOrder
from common.rundir import RunDirectory
from common.types import Prompt
from deploy.control import Control
from deploy.preflight import check_inputs, check_resources, local_cpus
from deploy.progress import Progress
from learner import checkpoint as run_checkpoint
from learner.group import LearnerGroup
from rewards.pool import RewardPool
from rollout.pool import RolloutPool

log = logging.getLogger(__name__)
CONNECT_S = 10.0


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


@dataclass(frozen=True)
class Session(EvaluationSession):
    """Also the training prompts, the learner, and where to begin."""

    order: PromptOrder
    learner: LearnerGroup
    trackers: Trackers
    first_step: int


def connect(config: TrainConfig, learner_too: bool = True) -> None:
    """Joins the cluster that RAY_ADDRESS (set inside a Ray job) names, or starts a local one of this machine's CPUs."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
    else:
        check_resources(config, {"CPU": local_cpus(), "GPU": float("inf")}, learner_too)
        ray.init(
            address="local",
            num_cpus=local_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=512 << 20,
        )
    check_resources(config, capacity(), learner_too)


def _join(address: str) -> None:
    """ray.init for a cluster that is there. Ray itself tries a dead address for a quarter of an hour."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "3")  # tries, a second apart
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, log_to_driver=False)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address} but this run cannot join a cluster there ({_one_line(error)}). Give the "
            "head:port of `ray start --head`, with RAY_AUTH_MODE and RAY_AUTH_TOKEN as the cluster has them, or unset "
            "RAY_ADDRESS to run on this machine alone"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def capacity() -> dict[str, float]:
    """What the cluster has by resource, counting the nodes that it may still add.

    Those only the configuration tells that Ray's launcher leaves on the head, which is where the driver of a job runs.
    """
    later: Counter[str] = Counter()
    launched = Path.home() / "ray_bootstrap_config.yaml"
    if launched.is_file():
        for group in yaml.safe_load(launched.read_text())["available_node_types"].values():
            for name, amount in group["resources"].items():
                later[name] += amount * group.get("max_workers", 0)
    now = ray.cluster_resources()
    return {name: max(now.get(name, 0), later[name]) for name in now.keys() | later.keys()}


@contextmanager
def open_session(config: TrainConfig, resume: bool = False) -> Iterator[Session]:
    """Checks everything, makes or reopens the run directory, starts the actors; ends them on the way out."""
    inputs = check_inputs(config)
    run = RunDirectory(config.directory)
    checkpoint, first = None, 0
    if resume:
        run.open().clear_partial()
        if found := run_checkpoint.newest_whole(run.checkpoints):
            checkpoint, first = found[0], int(found[1]["step"])
            if run_checkpoint.identity(resolve_path(config.model.path)) != found[1]["reference"]:
                raise ConfigError(
                    f"model.path {config.model.path} is not the checkpoint that {run.path} started from, so the update "
                    "would be held to another reference than before; restore it, or start a new run"
                )
    elif run.path.exists():
        raise ConfigError(f"{run.path} exists already; give another run_name, or --resume to continue that run")
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config.steps, first))
        progress.phase("starting Ray")
        connect(config)
        stack.callback(ray.shutdown)
        if not resume:
            run.create(to_yaml(config))
        control = Control(run)
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
        learner.check_sees(run.config)
        rollout.wait_ready()
        control.follow(rollout)
        stack.callback(control.close)
        trackers = Trackers(config, run, first if resume else None)
        stack.callback(trackers.close)
        order = PromptOrder(inputs.train, config.data.prompts_per_step, config.seed)
        yield Session(config, run, inputs.heldout, rollout, rewards, progress, order, learner, trackers, first)


@contextmanager
def open_evaluation(config: TrainConfig) -> Iterator[EvaluationSession]:
    """As `open_session` without a learner: the replicas keep the weights of the checkpoint they were built from."""
    inputs = check_inputs(config)
    run = RunDirectory(config.directory)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(0))
        progress.phase("starting Ray")
        connect(config, learner_too=False)
        stack.callback(ray.shutdown)
        run.create(to_yaml(config))
        progress.phase(f"starting {config.rollout.replicas} rollout replicas")
        rollout = RolloutPool(config)
        stack.callback(rollout.close)
        rewards = RewardPool(config.rewards, config.run_name, config.on_nonfinite)
        stack.callback(rewards.close)
        rollout.wait_ready()
        yield EvaluationSession(config, run, inputs.heldout, rollout, rewards, progress)
