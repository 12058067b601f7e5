"""`unigrpo sft`: the supervised stage on Ray actors, with live progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import RayActorError

from common.actors import not_built, options
from common.bagel.checkpoint import check
from common.config import ConfigError, Resources, resolve_path
from common.rundir import RunDirectory, make_directory
from common.runtime import free_port
from common.sft_config import SFTConfig, load_sft_config
from deploy.local_ray import start_ray
from deploy.preflight import local_cpus
from deploy.progress import Progress
from learner.dataset import check_parquet
from learner.sft_actor import SFTRank, create_policy


def run_sft(recipe: str, overrides: list[str]) -> None:
    """Trains and writes the checkpoint. ConfigError for bad input, before anything starts."""
    config = load_sft_config(recipe, overrides)
    out = Path(config.out).resolve()
    if out.exists():
        raise ConfigError(f"out: {out} exists already; remove it or give another directory")
    start = str(resolve_path(config.start)) if config.start else None
    if start:
        check(Path(start))
    if config.data != "shapes":
        check_parquet(resolve_path(config.data), config.batch * config.ranks)
    run = RunDirectory(out.parent / f"{out.name}-sft")
    if run.path.exists():
        raise ConfigError(f"{run.path} is left of an attempt to make {out}; remove it, or give another out")
    make_directory(out.parent, "out")
    run.create(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    start_ray(local_cpus())
    try:
        with Progress(config.steps) as progress:
            if config.create:
                progress.phase("fitting tokenizer and autoencoder")
                make = ray.remote(create_policy).options(**options(Resources(cpus=local_cpus())))
                start = ray.get(make.remote(config, config.create, str(run.path / "start")))
            assert start is not None
            _train(config.model_copy(update={"out": str(out)}), start, run, progress)
    finally:
        ray.shutdown()
    print(f"checkpoint: {out}")


def _train(config: SFTConfig, start: str, run: RunDirectory, progress: Progress) -> None:
    address = f"{ray.util.get_node_ip_address()}:{free_port()}"
    actor = ray.remote(SFTRank).options(**options(config))
    ranks: list[Any] = [actor.remote(config, start, rank, address, str(run.path)) for rank in range(config.ranks)]
    progress.phase("preparing examples")
    pending = [rank.train.remote() for rank in ranks]
    shown = 0
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=5)
        try:
            ray.get(done)
        except RayActorError as error:
            raise not_built(error) or error from error
        rows = run.read_metrics()
        if len(rows) > shown:
            shown = len(rows)
            last = rows[-1]
            losses = f"text loss {last['loss/text']:.3f}  image loss {last['loss/image']:.3f}"
            progress.phase(f"sft step {shown}/{config.steps}  {losses}")
