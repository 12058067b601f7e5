"""What is compared: the rows of the paper's table and its ablations, as recipes."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.checkpoint_files import sha256
from common.config import REPOSITORY, ConfigError, Model, TrainConfig, resolve_path
from common.recipe import load_config
from common.rundir import RunDirectory

RUNS = "runs/reproduction"
STEPS = 240
"""Of every stage that trains, unless asked otherwise."""
SCORING = {"name", "weight", "options"}
"""What makes a scorer's scores; the rest is how many actors it has and how long one waits for them."""
LEARNED_REWARD = "common/shapes/data/learned.safetensors"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tasks in the paper's order. `reasoning`, the riddles, is the shapes task's own."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison. recipes: the stages, each starting from the one before; paper: its TA and GenEval
    where the paper has the row; tasks: its GenEval by task, in the order of TASKS; most_steps: of a stage, where
    fewer than asked for show what the row is for."""

    title: str
    recipes: tuple[str, ...]
    paper: tuple[float, float] | None = None
    tasks: tuple[float, ...] | None = None
    most_steps: int | None = None


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
    "cfg-evaluation": Row("UniGRPO, CFG in evaluation alone", ("shapes", "cfg-evaluation")),
    "no-image-gradient": Row("UniGRPO, no image gradient into reasoning", ("no-image-gradient",)),
    "learned-none": Row("Learned reward, no regulariser", ("learned-none",), most_steps=140),
    "learned-latent-kl": Row("Learned reward, latent KL", ("learned-latent-kl",), most_steps=140),
    "learned-velocity-mse": Row("Learned reward, velocity MSE", ("learned-velocity-mse",), most_steps=140),
}


@dataclass(frozen=True)
class Plan:
    """What to run: rows, seeds, steps of every stage that trains (no more than the row's most_steps), overrides of
    every recipe, and where the results go."""

    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    overrides: tuple[str, ...]
    out: Path

    @property
    def command(self) -> str:
        """How to ask for this again, whatever the rows and seeds."""
        steps = ["--steps", str(self.steps)] if self.steps != STEPS else []
        out = ["--out", str(self.out)] if self.out != default_out() else []
        return shlex.join(["unigrpo", "reproduce", *self.overrides, *steps, *out])


def check_rows(rows: Sequence[str]) -> tuple[str, ...]:
    """The rows asked for, all of them for none. ConfigError for an unknown one."""
    for row in rows:
        if row not in ROWS:
            raise ConfigError(f"--rows: {row} is not known; choose from {', '.join(ROWS)}")
    return tuple(rows) or tuple(ROWS)


def check_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """What is set in all rows. ConfigError for what a row or its cells have of their own."""
    own = {"steps": "--steps", "seed": "--seeds", "run_name": "--out", "runs_dir": "--out", "max_minutes": "--steps"}
    for override in overrides:
        if option := own.get(override.partition("=")[0]):
            raise ConfigError(f"{override}: cells have names, seeds and lengths of their own; use {option}")
    return tuple(overrides)


def check_out(out: Path) -> Path:
    """Where the results go, absolute. ConfigError for a directory beside which no page can be written."""
    out = out.absolute()
    if not out.name or out.name == "..":
        raise ConfigError(f"--out is {out}; give a directory with a name, which the page beside it takes")
    return out


def check_trial(plan: Plan) -> None:
    """ConfigError for settings of one's own whose cells would take the place of the committed set's."""
    if plan.out == default_out() and (plan.overrides or plan.steps != STEPS):
        own = " ".join([*plan.overrides, *([f"--steps {plan.steps}"] if plan.steps != STEPS else [])])
        raise ConfigError(
            f"{own}: cells made so would replace the set in {plan.out}, which has none of it; give --out a directory "
            "of its own, e.g. --out runs/trial"
        )


def settings(plan: Plan, row: str) -> list[TrainConfig]:
    """The resolved recipes of a row's stages, before anything is said of seeds and directories."""
    configs = []
    for recipe in ROWS[row].recipes:
        config = load_config(recipe, ["max_minutes=0", *plan.overrides])
        steps = min(plan.steps, ROWS[row].most_steps or plan.steps)
        # A row that is only evaluated stays so.
        if config.steps and steps != config.steps:
            config = load_config(recipe, ["max_minutes=0", *plan.overrides, f"steps={steps}"])
        configs.append(config)
    return configs


def trains(plan: Plan, row: str) -> bool:
    """Whether a row trains; one that is only evaluated is the same for every seed."""
    return any(config.steps for config in settings(plan, row))


def origin(plan: Plan, row: str) -> dict[str, Any]:
    """What a row's cells are made of. Cells of another origin are stale: they are not compared with these.

    steps of each stage; recipe: what the resolved recipes set otherwise than the defaults and may change a result;
    start: the checkpoint's content; data: that of the prompts and, where it is a reward, of the learned scorer.
    """
    return _origin(settings(plan, row))


def _origin(configs: list[TrainConfig]) -> dict[str, Any]:
    data = [configs[0].data.train, configs[0].data.heldout]
    if any(scorer.name == "shapes_learned" for scorer in configs[0].rewards):
        data.append(LEARNED_REWARD)
    return {
        "steps": [config.steps for config in configs],
        "recipe": _hash(json.dumps([_matters(config) for config in configs], sort_keys=True)),
        "start": _start(configs[0].model),
        "data": _hash("".join(_content(resolve_path(path)) for path in data)),
    }


def stages(plan: Plan, row: str, seed: int) -> list[TrainConfig]:
    """The configurations of a cell's runs; later stages start from the last checkpoint of the one before.

    A run is named after what it is made of: what was begun of another origin is never continued, and rows that begin
    with the same stage share its run.
    """
    asked = settings(plan, row)
    configs: list[TrainConfig] = []
    for number, config in enumerate(asked, start=1):
        recipes = ROWS[row].recipes[:number]
        made_of = {**_origin(asked[:number]), "dtypes": dtypes(asked[number - 1])}
        key = _hash(json.dumps(made_of, sort_keys=True))[:8]
        own = [f"run_name={'-then-'.join(recipes)}-seed{seed}", f"runs_dir={RUNS}/{key}", f"seed={seed}"]
        own += ["max_minutes=0", f"steps={config.steps}", "checkpoints.keep=1"]
        config = load_config(recipes[-1], [*plan.overrides, *own])
        if configs:
            before = configs[-1]
            policy = str(RunDirectory(before.directory).checkpoint(before.steps) / "policy")
            # Whatever checkpoint the overrides name; that of a composed policy holds its pipeline too.
            start = config.model.model_copy(update={"path": policy, "pipeline": None})
            config = config.model_copy(update={"model": start})
        configs.append(config)
    return configs


def dtypes(config: TrainConfig) -> list[str]:
    """What learner and rollout compute in, which is the machine's choice unless a recipe says otherwise."""
    return [config.learner.dtype, config.rollout.dtype]


def _matters(config: TrainConfig) -> dict[str, Any]:
    """The settings that make the result: not names, nor how many actors there are and what they keep, nor a compute
    type that is the machine's choice; a cell says which it had."""
    told = config.model_dump(mode="json", exclude_defaults=True)
    for name in ("run_name", "runs_dir", "seed", "steps", "max_minutes", "rollout", "recording", "checkpoints"):
        told.pop(name, None)
    lora = told.pop("learner", {}).get("lora")
    model = {name: value for name, value in told.pop("model", {}).items() if name != "path"}
    rewards = [scorer.model_dump(include=SCORING) for scorer in config.rewards]
    usual = TrainConfig.model_fields["rewards"].get_default(call_default_factory=True)
    told.pop("rewards", None)
    if rewards != [scorer.model_dump(include=SCORING) for scorer in usual]:
        told["rewards"] = rewards
    asked = {
        name: section.dtype
        for name, section in (("learner", config.learner), ("rollout", config.rollout))
        if "dtype" in section.model_fields_set
    }
    return {**told, "model": model, "lora": lora, **({"dtypes": asked} if asked else {})}


def _start(model: Model) -> str:
    from common.policy import directories

    return _checkpoint_identity(tuple(directories(model)))


@cache
def _checkpoint_identity(directories: tuple[Path, ...]) -> str:
    from learner.checkpoint import identity

    return identity(directories)[:16]


_content = cache(sha256)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_out() -> Path:
    """docs/reproduction of the repository."""
    return REPOSITORY / "docs" / "reproduction"
