"""Runs the cells that are missing. A cell that was cut short goes on from its run's last checkpoint."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from common.config import ConfigError, TrainConfig
from common.recipe import load_config
from common.rundir import RunDirectory, make_directory
from deploy.reproduction.cells import CURVES, Cell, digest, minutes_left, missing, read_cells, rounded, write_cell
from deploy.reproduction.page import write_page
from deploy.reproduction.rows import Plan, check_trial, dtypes, origin, stages


class ReproductionError(RuntimeError):
    """Cells that could not be made; the others are."""


def reproduce(plan: Plan, say: Callable[[str], None] = print) -> Path:
    """Runs what the plan lacks, one seed of all rows after the other, and writes the page after each cell.

    A cell that fails is said and left for the next call, so that it does not cost the others; ReproductionError at
    the end if there was one. ConfigError at once.
    """
    check_trial(plan)
    make_directory(plan.out / "cells", "--out")
    stored, failed = read_cells(plan), []
    for (row, seed), differs in stored.stale.items():
        say(f"stale: {row} seed {seed} was made with another {differs}; it is not counted, and run again if asked for")
    todo = missing(plan, stored)
    for number, (row, seed) in enumerate(todo):
        left = minutes_left(plan, stored, todo[number:])
        say(f"cell {number + 1} of {len(todo)}: {row} seed {seed}; {_duration(left)} left")
        try:
            write_cell(plan, run_cell(plan, row, seed))
        except ConfigError:
            raise
        except Exception as error:  # of any actor or engine; whatever it is, the next cell starts its own
            failed.append(f"{row} seed {seed}: {type(error).__name__}: {error}")
            say(f"failed: {failed[-1]}")
        stored = read_cells(plan)
        write_page(plan, stored)
    if failed:
        raise ReproductionError(f"{len(failed)} cells failed; ask again to try them again. {'; '.join(failed)}")
    return write_page(plan, stored)


def _duration(minutes: float | None) -> str:
    return "an unknown time" if minutes is None else f"about {timedelta(minutes=round(minutes))}"


def run_cell(plan: Plan, row: str, seed: int) -> Cell:
    """Trains (or only evaluates) one cell, going on where an earlier attempt stopped."""
    began = time.monotonic()
    configs = stages(plan, row, seed)
    runs = [_run(config) for config in configs]
    results = [result for run in runs for result in run.read_evaluations().values()]
    metrics = [line for run in runs for line in run.read_metrics()]
    minutes = sum(line["time/step_s"] for line in metrics) / 60
    return {
        "row": row,
        "seed": seed,
        "origin": origin(plan, row),
        "minutes": round(minutes, 2),
        # Of a cell that was cut short at least the minutes of all its steps.
        "wall_minutes": round(max(minutes, (time.monotonic() - began) / 60), 2),
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "dtypes": dtypes(configs[-1]),
        "result": digest(results[-1]),
        "curves": {key: [rounded(line.get(key)) for line in metrics] for key in CURVES},
    }


def _run(config: TrainConfig) -> RunDirectory:
    from deploy.evaluation_run import evaluate
    from deploy.loop import train
    from deploy.session import open_evaluation, open_session
    from learner.checkpoint import newest_whole

    run = RunDirectory(config.directory)
    if run.path.exists() and load_config(str(run.open().config)) != config:
        raise ConfigError(f"{run.path} is a run of other settings; remove it, so that this one can take its place")
    found = newest_whole(run.checkpoints)
    saved = config.steps == 0 or (found is not None and found[1]["step"] == config.steps)
    if saved and run.evaluation_file(config.steps).exists():
        return run
    if config.steps == 0:
        shutil.rmtree(run.path, ignore_errors=True)  # of an attempt that was cut short
        with open_evaluation(config) as evaluation:
            evaluate(evaluation, step=0)
        return run
    with open_session(config, resume=run.path.exists()) as session:
        return train(session)


def machine() -> str:
    """Processor and CPUs in use; no name of the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs"
