"""`unigrpo reproduce`: the paper's rows and ablations in small, a run per row and seed, and a page that compares them.

A finished cell (row x seed) is a small JSON file under docs/reproduction/cells, which is committed: the set can be
continued at another time and on another machine. A cell that was cut short goes on from its run's last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError, TrainConfig
from common.recipe import load_config, read_recipe, to_yaml
from common.rundir import RunDirectory, dump_json, replacing
from deploy.evaluation import Result

Cell = dict[str, Any]

RUNS = "runs/reproduction"
CURVES = ("reward/mean", "reward/shapes/strict", "reward/shapes/ta")


@dataclass(frozen=True)
class Row:
    """One line of the comparison. recipes: the stages, each starting from the one before; paper: its TA and GenEval
    where the paper has the row; tasks: its GenEval by task, in the order of TASKS."""

    title: str
    recipes: tuple[str, ...]
    paper: tuple[float, float] | None = None
    tasks: tuple[float, ...] | None = None


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tasks in the paper's order. `reasoning`, the riddles, is the shapes task's own."""

ROWS = {
    "sft": Row("SFT, no thinking", ("sft",), (0.7486, 0.83)),
    "sft-think": Row("SFT, thinking", ("sft-think",), (0.7769, 0.82), (0.98, 0.93, 0.63, 0.91, 0.68, 0.79)),
    "refl": Row("ReFL, no thinking", ("refl",), (0.7786, 0.85)),
    "refl-think": Row("ReFL, thinking", ("refl-think",), (0.8120, 0.84)),
    "flowgrpo": Row("FlowGRPO, no thinking", ("flowgrpo",), (0.8112, 0.88), (0.99, 0.98, 0.93, 0.94, 0.60, 0.86)),
    "flowgrpo-think": Row("FlowGRPO, thinking", ("flowgrpo-think",), (0.8208, 0.86)),
    "textgrpo": Row("TextGRPO", ("textgrpo",), (0.8078, 0.88), (0.99, 0.96, 0.87, 0.91, 0.76, 0.84)),
    "two-stage": Row("FlowGRPO, then TextGRPO", ("flowgrpo-think", "textgrpo")),
    "unigrpo": Row("UniGRPO", ("shapes",), (0.8381, 0.90), (0.99, 0.99, 0.91, 0.91, 0.73, 0.86)),
    "cfg": Row("UniGRPO, CFG in training", ("cfg",)),
    "no-image-gradient": Row("UniGRPO, no image gradient into reasoning", ("no-image-gradient",)),
    "learned-none": Row("Learned reward, no regulariser", ("learned-none",)),
    "learned-latent-kl": Row("Learned reward, latent KL", ("learned-latent-kl",)),
    "learned-velocity-mse": Row("Learned reward, velocity MSE", ("learned-velocity-mse",)),
}


@dataclass(frozen=True)
class Plan:
    """What to run: rows, seeds, steps of every stage that trains (None: the recipe's), overrides of every recipe, and
    where the results go."""

    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int | None
    overrides: tuple[str, ...]
    out: Path

    def cell_file(self, row: str, seed: int) -> Path:
        return self.out / "cells" / f"{row}-seed{seed}.json"


def reproduce(plan: Plan) -> Path:
    """Runs the cells that are missing, one seed of all rows after the other, and writes the page after each.

    ConfigError for a cell or an unfinished run that was made of something else; of cells, before any is run.
    """
    from deploy.reproduction_page import write_page

    missing = [
        (row, seed)
        for seed in plan.seeds
        for row in plan.rows
        if seed in seeds_of(plan, row) and finished(plan, row, seed) is None
    ]
    for row, seed in missing:
        cell = run_cell(plan, row, seed)
        with replacing(plan.cell_file(row, seed)) as aside:
            aside.write_bytes(dump_json(cell) + b"\n")
        write_page(plan.out)
    return write_page(plan.out)


def check_rows(rows: Sequence[str]) -> tuple[str, ...]:
    """The rows asked for, all of them for none. ConfigError for an unknown one."""
    for row in rows:
        if row not in ROWS:
            raise ConfigError(f"--rows: {row} is not known; choose from {', '.join(ROWS)}")
    return tuple(rows) or tuple(ROWS)


def seeds_of(plan: Plan, row: str) -> tuple[int, ...]:
    """A row that is only evaluated is the same for every seed, so it is evaluated once."""
    return plan.seeds if any(config.steps for config in stages(plan, row, 0)) else plan.seeds[:1]


def finished(plan: Plan, row: str, seed: int) -> Cell | None:
    """The stored cell, None if it has still to be run. ConfigError if it was made of something else."""
    path = plan.cell_file(row, seed)
    if not path.exists():
        return None
    cell: Cell = json.loads(path.read_bytes())
    for key, asked in origin(plan, row, seed).items():
        if (had := cell["origin"].get(key)) != asked:
            raise ConfigError(
                f"{path} was made with {key} {had}, not {asked}; remove it to run it again, ask for the same, or give "
                "another --out"
            )
    return cell


def origin(plan: Plan, row: str, seed: int) -> dict[str, Any]:
    """What a cell is made of: cells of one page must agree with today's recipes, start and arguments."""
    from common.policy import directories
    from learner.checkpoint import identity

    configs = stages(plan, row, seed)
    recipes = json.dumps([read_recipe(recipe) for recipe in ROWS[row].recipes], sort_keys=True)
    return {
        "steps": [config.steps for config in configs],
        "overrides": list(plan.overrides),
        "recipe": hashlib.sha256(recipes.encode()).hexdigest()[:16],
        "start": identity(directories(configs[0].model))[:16],
    }


def stages(plan: Plan, row: str, seed: int) -> list[TrainConfig]:
    """The resolved configurations of a cell's runs; later stages start from the last checkpoint of the one before."""
    configs: list[TrainConfig] = []
    for number, recipe in enumerate(ROWS[row].recipes):
        own = [f"run_name={row}-seed{seed}-{number}", f"runs_dir={RUNS}", f"seed={seed}", "max_minutes=0"]
        if configs:
            before = configs[-1]
            policy = RunDirectory(before.directory).checkpoint(before.steps) / "policy"
            own.append(f"model.path={policy}")
        # A row that is only evaluated stays so.
        steps = [f"steps={plan.steps}"] if plan.steps is not None and load_config(recipe).steps else []
        configs.append(load_config(recipe, [*own, *steps, *plan.overrides]))
    return configs


def run_cell(plan: Plan, row: str, seed: int) -> Cell:
    """Trains (or only evaluates) one cell, going on where an earlier attempt stopped."""
    runs = [_run(config) for config in stages(plan, row, seed)]
    results = [result for run in runs for result in run.read_evaluations().values()]
    metrics = [line for run in runs for line in run.read_metrics()]
    return {
        "row": row,
        "seed": seed,
        "origin": origin(plan, row, seed),
        "minutes": round(sum(line["time/step_s"] for line in metrics) / 60, 2),
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "result": digest(results[-1]),
        "curves": {key: [_rounded(line.get(key)) for line in metrics] for key in CURVES},
    }


def _run(config: TrainConfig) -> RunDirectory:
    from deploy.evaluation_run import evaluate
    from deploy.loop import train
    from deploy.session import open_evaluation, open_session

    run = RunDirectory(config.directory)
    if run.path.exists() and run.open().config.read_text(encoding="utf-8") != to_yaml(config):
        raise ConfigError(f"{run.path} is a run of other settings; remove it, so that this one can take its place")
    saved = config.steps == 0 or run.latest_checkpoint() == run.checkpoint(config.steps)
    if saved and run.evaluation_file(config.steps).exists():
        return run
    if config.steps == 0:
        shutil.rmtree(run.path, ignore_errors=True)  # of an attempt that was cut short
        with open_evaluation(config) as evaluation:
            evaluate(evaluation, step=0)
        return run
    with open_session(config, resume=run.path.exists()) as session:
        return train(session)


def digest(result: Result) -> Result:
    """What the page needs of an evaluation: counts by prompt, in the order that every evaluation of the file has."""
    columns = ("images", "strict", "ta", "ta_images")
    tags = [prompt["tag"] for prompt in result["prompts"]]
    counts = {name: [_rounded(prompt[name]) for prompt in result["prompts"]] for name in columns}
    headlines = {name: result[name] for name in ("strict", "task_mean", "ta", "reasoning_accuracy")}
    return {**headlines, "unscored": result["unscored"], "tags": tags, **counts}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def machine() -> str:
    """Processor and CPUs in use; no name of the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs"


def default_out() -> Path:
    """docs/reproduction of the repository."""
    from common.config import REPOSITORY

    return REPOSITORY / "docs" / "reproduction"
