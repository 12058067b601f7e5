"""What a configuration may not ask for together: each message names the fields, their values and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.config import TrainConfig

SECRET = re.compile(r"(?i)(^|_)(key|token|secret|password)$")


def contradictions(config: TrainConfig) -> Iterator[str]:
    """Every contradiction, in the order in which they should be mended; of training only where there is any."""
    always = _window, _guidance, _replicas, _reasoner, _rewards
    training = _noise, _batch, _learner, _objective, _groups
    for check in (*always, *(training if config.steps else ())):
        yield from check(config)


def _window(config: TrainConfig) -> Iterator[str]:
    s, (low, high) = config.sampling, config.sampling.window_range
    if not 0 <= low < high:
        yield f"sampling.window_range is [{low}, {high}]; give 0 <= low < high"
    if s.window_size > high - low:
        yield (
            f"sampling.window_size is {s.window_size} but window_range [{low}, {high}] holds {high - low} steps; "
            "make the window smaller or the range wider"
        )
    if high > s.points - 1:
        yield (
            f"sampling.window_range ends at step {high} but {s.points} points are {s.points - 1} steps; "
            "lower the range or raise sampling.points"
        )
    if s.sampler == "flow_cps" and high == s.points - 1:
        yield f"sampling.window_range ends at step {high}, the last one, where flow_cps adds no noise; end it earlier"


def _noise(config: TrainConfig) -> Iterator[str]:
    s, o = config.sampling, config.objective
    if s.points == 2 and s.noise_level > 0:
        yield "sampling.points is 2: a single step leaves nothing to explore; raise it"
    if s.noise_level == 0 and o.image_weight:
        yield (
            f"sampling.noise_level is 0 but objective.image_weight is {o.image_weight:g}; without noise there is no "
            "ratio to train on: raise the noise or set the weight to 0"
        )
    if s.sampler == "flow_cps" and s.noise_level > 1:
        yield f"sampling.noise_level is {s.noise_level:g}; flow_cps knows levels from 0 to 1"


def _guidance(config: TrainConfig) -> Iterator[str]:
    training, evaluation = config.sampling.cfg, config.evaluation.cfg
    for name, cfg in (("sampling", training), ("evaluation", evaluation)):
        if cfg.image_scale > 1 and not cfg.enabled:
            yield f"{name}.cfg.image_scale is {cfg.image_scale:g} but {name}.cfg.text_scale is 1, which is no guidance"
        if not 0 <= cfg.interval[0] < cfg.interval[1] <= 1:
            yield f"{name}.cfg.interval is {list(cfg.interval)}; give 0 <= low < high <= 1"
    if training.enabled and not evaluation.enabled:
        yield (
            f"sampling.cfg.text_scale is {training.text_scale:g} but evaluation.cfg.text_scale is 1; a policy trained "
            "with guidance draws with it: give evaluation.cfg the same scales, or train without"
        )


def _batch(config: TrainConfig) -> Iterator[str]:
    prompts, ranks, parts = config.data.prompts_per_step, config.learner.ranks, config.objective.minibatches
    if prompts % (ranks * parts):
        yield (
            f"data.prompts_per_step is {prompts}, which {ranks} learner ranks x {parts} minibatches do not divide; "
            f"use a multiple of {ranks * parts}"
        )


def _replicas(config: TrainConfig) -> Iterator[str]:
    (fewest, most), replicas = config.replica_bounds, config.rollout.replicas
    if not fewest <= replicas <= most:
        yield (
            f"rollout.replicas is {replicas}, outside min_replicas {fewest} and max_replicas {most}; "
            "give min_replicas <= replicas <= max_replicas"
        )


def _learner(config: TrainConfig) -> Iterator[str]:
    if config.learner.zero_stage == 3 and config.learner.reference_on_host:
        yield (
            "learner.zero_stage is 3 but learner.reference_on_host exchanges whole weights; take stage 2, or "
            "objective.regulariser=none with objective.text_kl=0, which needs no reference"
        )
    if config.learner.zero_stage == 3 and config.learner.activation_checkpointing:
        yield (
            "learner.zero_stage is 3 but learner.activation_checkpointing holds on to weights that stage 3 lets go of "
            "after each layer; take stage 2, or more ranks without recomputation"
        )


def _reasoner(config: TrainConfig) -> Iterator[str]:
    rollout = config.rollout
    own = rollout.reasoner_actor
    if own and not config.sampling.think:
        yield "rollout.reasoner_actor is set but sampling.think is false; nobody reasons: remove it"
    if own and bool(own.gpus) != bool(rollout.gpus):
        yield (
            f"rollout.gpus is {rollout.gpus:g} but rollout.reasoner_actor.gpus is {own.gpus:g}; vLLM and the denoiser "
            "run both on GPUs or both on CPUs"
        )


def _rewards(config: TrainConfig) -> Iterator[str]:
    names = [scorer.name for scorer in config.rewards]
    if len(set(names)) != len(names):
        yield f"rewards names a scorer twice: {', '.join(names)}; give each one entry"
    for place, scorer in enumerate(config.rewards):
        for name in (name for name, value in scorer.options.items() if isinstance(value, str) and SECRET.search(name)):
            # Without the value: messages go to logs.
            yield (
                f"rewards.{place}.options.{name} looks like a secret, which config.yaml would show; let the scorer "
                "read it from an environment variable and give that variable's name"
            )


def _objective(config: TrainConfig) -> Iterator[str]:
    s, o = config.sampling, config.objective
    if not s.think and (o.text_weight or o.text_kl):
        yield (
            f"sampling.think is false but objective.text_weight is {o.text_weight:g} and objective.text_kl is "
            f"{o.text_kl:g}; there are no tokens to train: set both to 0"
        )
    if o.text_weight == 0 and o.image_weight == 0:
        yield "objective.text_weight and objective.image_weight are both 0; nothing would be trained"
    if config.algorithm == "refl":
        if o.text_weight:
            yield f"objective.text_weight is {o.text_weight:g} but algorithm refl leaves the text alone; set it to 0"
        if "shapes_learned" not in {scorer.name for scorer in config.rewards}:
            yield "algorithm is refl but rewards has no shapes_learned, whose gradient it follows; add it"
    if o.epochs > 1 and config.max_staleness:
        yield (
            f"objective.epochs is {o.epochs} but max_staleness is {config.max_staleness}; the old means of stale "
            "chains are the rollout's, not the learner's, and further epochs would clip on the difference: set epochs "
            "to 1 or max_staleness to 0"
        )


def _groups(config: TrainConfig) -> Iterator[str]:
    taken = {"reasoning", "denoising", "frozen"}
    for place, group in enumerate(config.optimizer.groups):
        if group.name in taken:
            yield (
                f"optimizer.groups.{place}.name is {group.name!r}, which another group of parameters has already; "
                "give each its own"
            )
        taken.add(group.name)
