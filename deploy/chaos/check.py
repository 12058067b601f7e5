"""What must be true after a chaos run: every step once, every group once, one set of weights, nothing left behind."""

from __future__ import annotations

import json
import time
from pathlib import Path

from common.config import TrainConfig, resolve_path
from common.prompts import PromptOrder, read_prompts
from common.records import read_groups
from common.rundir import RunDirectory
from common.scratch import PREFIX
from deploy.chaos.cluster import ACTORS, Cluster, title
from deploy.requests import training_requests
from learner import checkpoint as run_checkpoint

AUDIT = "audit.json"
"""Where the driver of a chaos run leaves the checksums of all weights."""
LINGER_S = 60.0


def check_run(run: RunDirectory, config: TrainConfig) -> list[str]:
    """Problems with what the run wrote; none for a run that might as well have been left alone."""
    problems = []
    rows = run.read_metrics()
    if (logged := [row["step"] for row in rows]) != list(range(config.steps)):
        problems.append(f"the logged steps are {logged}, not 0 to {config.steps - 1} once each")
    for row in rows:
        if row["weights/version"] != row["step"] + 1:
            problems.append(
                f"step {row['step']} made version {row['weights/version']:g}: an update is missing or doubled"
            )
        if row["reward/masked_chains"] or row["rollout/stale_groups"]:
            problems.append(f"step {row['step']} left groups out")
    problems += _check_groups(run, config)
    if (found := run_checkpoint.newest_whole(run.checkpoints)) is None or found[1]["step"] != config.steps:
        problems.append("there is no whole checkpoint of the last step")
    audit = json.loads((run.path / AUDIT).read_bytes())
    problems += [
        f"{name} holds other weights than the learner"
        for name, checksum in audit["replicas"].items()
        if checksum != audit["learner"]
    ]
    if len(audit["replicas"]) < config.replica_bounds[0]:
        problems.append(f"only {len(audit['replicas'])} replicas are left")
    return problems


def _check_groups(run: RunDirectory, config: TrainConfig) -> list[str]:
    """Against what a step asks for: its prompts and seeds, each once, by weights that were current enough."""
    problems = []
    order = PromptOrder(read_prompts(resolve_path(config.data.train)), config.data.prompts_per_step, config.seed)
    for step in range(config.steps):
        path = run.rollout_file(step)
        if not path.exists():
            problems.append(f"{path.name} is missing")
            continue
        groups = [group for group, *_ in read_groups(path)]
        wanted = [(request.prompt.id, request.seeds) for request in training_requests(config, order, step)]
        if [(group.prompt.id, tuple(chain.seed for chain in group.chains)) for group in groups] != wanted:
            problems.append(f"step {step} was trained on other groups than its own, each once")
        versions = {segment.version for group in groups for chain in group.chains for segment in chain.segments}
        if not versions <= set(range(step - config.max_staleness, step + 1)):
            problems.append(f"step {step} was trained on groups of versions {sorted(versions)}")
    return problems


def check_left(run: RunDirectory, cluster: Cluster, temporary: Path) -> list[str]:
    """Problems with what outlives the run: actors, half-written files, shared memory."""
    deadline = time.monotonic() + LINGER_S
    while (alive := [p for kind in ACTORS for p in cluster.actors(kind)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    problems = [f"{title(process)} is still there" for process in alive]
    problems += [f"{path} is half-written" for path in run.path.rglob("*.partial*")]
    problems += [f"{path} is left" for path in temporary.glob(f"{PREFIX}*")]
    pids = {str(process.pid) for process in cluster.seen}
    for path in Path("/dev/shm").iterdir():
        if pids & set(path.name.replace("-", "_").split("_")):
            problems.append(f"{path} is shared memory of an actor that has ended")
    return problems
