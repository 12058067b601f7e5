"""Everything that can be found wrong before anything starts: each error names the thing, the value and the remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.config import ConfigError, Resources, TrainConfig, resolve_path
from common.prompts import evenly, read_prompts
from common.sizes import is_here
from common.system_prompts import system_prompt
from common.types import Prompt
from rewards.scorer import check, check_prompts

if TYPE_CHECKING:
    from common.policy import Outline


@dataclass(frozen=True)
class Inputs:
    """What a run reads: checked. parameters: which of the policy's are trained, for people."""

    train: list[Prompt]
    heldout: list[Prompt]
    parameters: str


@dataclass(frozen=True)
class Demand:
    """Actors of one kind and what each is given."""

    kind: str
    count: int
    given: Resources


def demands(config: TrainConfig, learner_too: bool = True, replicas: int | None = None) -> list[Demand]:
    """The actors that a run, or an evaluation, which has no learner, cannot begin without. replicas: how many a live
    run was told to have."""
    fewest = min(config.replica_bounds[0], replicas or config.replica_bounds[0])
    return [
        *(Demand(kind, fewest, given) for kind, given in config.rollout.actors.items()),
        *([Demand("learner", config.learner.ranks, config.learner)] if learner_too else []),
        *(Demand(f"reward:{scorer.name}", scorer.replicas, scorer) for scorer in config.rewards),
    ]


def check_inputs(config: TrainConfig, weights: bool = True) -> Inputs:
    """Reads prompts, looks at the checkpoint and the scorers. ConfigError or CheckpointError.

    weights: False lets a checkpoint be elsewhere; what needs its files (clip, prompt lengths) is then unchecked.
    """
    from common.policy import outline

    model = outline(config.model) if weights or is_here(config.model) else None
    if model:
        check_image(config, model)
        check_guidance(config, model)
    check_schedules(config)
    check(config.rewards)
    # An evaluation needs no training prompts.
    train = read_prompts(resolve_path(config.data.train)) if config.steps else []
    heldout = read_prompts(resolve_path(config.data.heldout))
    if config.steps and config.data.prompts_per_step > len(train):
        raise ConfigError(
            f"data.prompts_per_step is {config.data.prompts_per_step} but {config.data.train} has {len(train)} prompts"
        )
    if model:
        check_lengths(config, model, [*train, *heldout])
    check_prompts(config.rewards, train, config.data.train)
    check_prompts(config.rewards, heldout, config.data.heldout)
    return Inputs(train, evenly(heldout, config.evaluation.prompts), check_parameters(config, model) if model else "")


def check_parameters(config: TrainConfig, model: Outline) -> str:
    """The table of parameter groups. ConfigError for optimizer.frozen and optimizer.groups, for learner.lora, and for
    an objective that would train nothing."""
    from common.parameters import check_reached, choose, table

    policy = model.skeleton()
    choose(policy, config.learner, config.optimizer)
    if config.steps:
        check_reached(policy, config.optimizer, config.objective)
    return table(policy, config.optimizer)


def trained_names(config: TrainConfig) -> set[str]:
    """Names of the parameters that a run trains."""
    from common.parameters import choose, groups
    from common.policy import outline

    policy = outline(config.model).skeleton()
    choose(policy, config.learner, config.optimizer)
    return {name for pairs in groups(policy, config.optimizer).values() for name, _ in pairs}


def check_image(config: TrainConfig, model: Outline) -> None:
    """ConfigError for an image size that the model cannot draw, or a clip that is nothing at that size."""
    from common.flow import image_bound

    rows, cols = check_size(config, model)
    try:
        image_bound(config.objective, rows * cols * model.token_dim)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_size(config: TrainConfig, model: Outline) -> tuple[int, int]:
    """Rows and columns of image tokens. ConfigError for an image size that the model cannot draw."""
    try:
        return model.grid(config.model.height, config.model.width)
    except ValueError as error:
        raise ConfigError(f"model.height x model.width: {error}") from error


def check_guidance(config: TrainConfig, model: Outline) -> None:
    """ConfigError for guidance of a model that draws with one branch."""
    for name, cfg in (("sampling", config.sampling.cfg), ("evaluation", config.evaluation.cfg)):
        if cfg.enabled and not model.guided:
            raise ConfigError(
                f"{name}.cfg.text_scale is {cfg.text_scale:g} but {config.model.path} is drawn by a pipeline with one "
                "branch; give 1"
            )


def check_schedules(config: TrainConfig) -> None:
    """ConfigError for times that fp32 cannot tell apart, or guidance at times that no step begins at."""
    from common.flow import timesteps

    shift = config.sampling.shift
    for name, points, cfg in (
        ("sampling", config.sampling.points, config.sampling.cfg),
        ("evaluation", config.evaluation.points, config.evaluation.cfg),
    ):
        times = np.array(timesteps(points, shift), np.float32)
        if (np.diff(times) >= 0).any():
            raise ConfigError(
                f"sampling.shift is {shift:g}, with which neighbours of the {points} times of {name}.points are one "
                "number in fp32; take a shift nearer to 1"
            )
        low, high = cfg.interval
        if cfg.enabled and not any(low < t <= high for t in times[:-1]):
            raise ConfigError(
                f"{name}.cfg.interval is [{low:g}, {high:g}], but no step of {name}.points {points} and sampling.shift "
                f"{shift:g} begins there (the last at {times[-2]:.3g}); widen it, or set {name}.cfg.text_scale to 1"
            )


def check_lengths(config: TrainConfig, model: Outline, prompts: list[Prompt]) -> None:
    """ConfigError for the first prompt that the reasoning engine would refuse in the middle of a run."""
    sampling, positions = config.sampling, model.positions
    if sampling.max_prompt_tokens + sampling.max_tokens > positions:
        raise ConfigError(
            f"sampling.max_prompt_tokens {sampling.max_prompt_tokens} + sampling.max_tokens {sampling.max_tokens} "
            f"exceed the {positions} positions of {config.model.path} (max_position_embeddings); lower one of them"
        )
    system = system_prompt(config.model.system_prompt)
    for prompt in prompts:
        length = len(model.chat.prompt_ids(prompt.text, system))
        if length > sampling.max_prompt_tokens:
            raise ConfigError(
                f"prompt {prompt.id} has {length} tokens, more than sampling.max_prompt_tokens = "
                f"{sampling.max_prompt_tokens}; raise the limit or shorten the prompt"
            )


def check_resources(asked: Sequence[Demand], capacity: Mapping[str, float]) -> None:
    """ConfigError if the actors together ask for more than the cluster has; capacity by Ray's resource names."""
    for name in dict.fromkeys(name for demand in asked for name in demand.given.asked):
        shares = [(d.kind, d.count, d.given.asked.get(name, 0.0)) for d in asked]
        want, have = sum(count * each for _, count, each in shares), capacity.get(name, 0.0)
        if want > have + 1e-6:
            parts = ", ".join(f"{kind} {count} x {each:g}" for kind, count, each in shares if each)
            field = {"CPU": "cpus", "GPU": "gpus"}.get(name, f"custom.{name}")
            raise ConfigError(
                f"the actors ask for {want:g} {_plural(name)} ({parts}) but the cluster has {have:g}; lower "
                f"rollout.replicas, learner.ranks or the {field} of one of them, or enlarge the cluster"
            )


def check_fits(wanted: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> None:
    """ConfigError if an actor is larger than any one node, there or still to come: it would wait for ever."""
    for demand in wanted:
        asked = {name: amount for name, amount in demand.given.asked.items() if amount}
        if not any(all(node.get(name, 0.0) >= amount for name, amount in asked.items()) for node in nodes):
            sizes = sorted({", ".join(f"{node.get(name, 0.0):g} {_plural(name)}" for name in asked) for node in nodes})
            raise ConfigError(
                f"one {demand.kind} actor asks for {', '.join(f'{n:g} {_plural(name)}' for name, n in asked.items())}, "
                f"but no node has as much (nodes: {'; '.join(sizes)}); lower its cpus, gpus or custom, or add nodes"
            )


def _plural(resource: str) -> str:
    return f"{resource}s" if resource in ("CPU", "GPU") else resource


def local_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def describe(config: TrainConfig) -> str:
    """The batch arithmetic and the actors, for people."""
    data, learner, objective = config.data, config.learner, config.objective
    chains = config.chains_per_step
    per_rank = chains / learner.ranks / objective.minibatches
    forwards = -(-per_rank // learner.chains_per_micro_batch)
    lines = [
        "batch",
        f"  {data.prompts_per_step} prompts x {data.group_size} chains = {chains} chains per step",
        f"  {objective.epochs} epochs x {objective.minibatches} minibatches = "
        f"{objective.epochs * objective.minibatches} optimizer steps per step",
        f"  {learner.ranks} ranks x {per_rank:g} chains = {forwards:g} micro-batches of at most "
        f"{learner.chains_per_micro_batch} chains per rank and optimizer step",
        f"  {config.sampling.points} time points = {config.sampling.points - 1} denoising steps, "
        f"{config.sampling.window_size} of them trained, first of them {config.sampling.window_range[0]}.."
        f"{config.sampling.window_range[1] - config.sampling.window_size}",
        f"  {config.steps} steps = {config.steps * chains} chains",
        "actors",
        *(
            f"  {d.count} x {d.kind}: {', '.join(f'{n:g} {_plural(name)}' for name, n in d.given.asked.items())} each"
            for d in demands(config)
        ),
    ]
    return "\n".join(lines)
