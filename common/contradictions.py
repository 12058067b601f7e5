"""What a configuration may not ask for together: each message names the fields, their values and the remedy."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from common.config import Objective, TrainConfig

LEAST_NOISE = 1e-4  # latents are of size 1 and fp32 rounds them to 1e-7
_SECRETS = "(api|access|private)?key", "token", "secret", "pass(word|wd|phrase)", "credentials?", "auth(orization)?"
SECRET = re.compile(rf"(^|[^a-z])({'|'.join(_SECRETS)})$")


def contradictions(config: TrainConfig) -> Iterator[str]:
    """Every contradiction, in the order in which they should be mended; of training only where there is any."""
    always = _window, _guidance, _replicas, _reasoner, _rewards
    training = _noise, _one_guidance, _batch, _learner, _weights, _objective, _refl, _rates, _groups
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
    if s.noise_level == 0 and o.image_weight and config.algorithm != "refl":
        yield (
            f"sampling.noise_level is 0 but objective.image_weight is {o.image_weight:g}; without noise there is no "
            "ratio to train on: raise the noise or set the weight to 0"
        )
    if 0 < s.noise_level < LEAST_NOISE:
        yield (
            f"sampling.noise_level is {s.noise_level:g}; fp32 cannot tell so little noise from rounding: give at least "
            f"{LEAST_NOISE:g}, or 0 for none"
        )
    if s.noise_level == 0 and o.regulariser == "latent_kl":
        yield (
            "sampling.noise_level is 0 but objective.regulariser is latent_kl, which is measured in units of the "
            "noise; raise it, or take velocity_mse"
        )
    if s.sampler == "flow_cps" and s.noise_level > 1:
        yield f"sampling.noise_level is {s.noise_level:g}; flow_cps knows levels from 0 to 1"


def _guidance(config: TrainConfig) -> Iterator[str]:
    for name, cfg in (("sampling", config.sampling.cfg), ("evaluation", config.evaluation.cfg)):
        if cfg.image_scale > 1 and not cfg.enabled:
            yield f"{name}.cfg.image_scale is {cfg.image_scale:g} but {name}.cfg.text_scale is 1, which is no guidance"
        if not 0 <= cfg.interval[0] < cfg.interval[1] <= 1:
            yield f"{name}.cfg.interval is {list(cfg.interval)}; give 0 <= low < high <= 1"
        if cfg.image_scale > 1 and not config.sampling.think:
            yield (
                f"{name}.cfg.image_scale is {cfg.image_scale:g} but sampling.think is false; there is no reasoning to "
                "leave out of the context: set the scale to 1"
            )


def _one_guidance(config: TrainConfig) -> Iterator[str]:
    training, evaluation = config.sampling.cfg, config.evaluation.cfg
    if training.enabled and not evaluation.enabled:
        yield (
            f"sampling.cfg.text_scale is {training.text_scale:g} but evaluation.cfg.text_scale is 1; a policy trained "
            "with guidance draws with it: give evaluation.cfg the same scales, or train without"
        )
    elif training.enabled and training != evaluation:
        name = next(n for n in type(training).model_fields if getattr(training, n) != getattr(evaluation, n))
        mine, other = getattr(training, name), getattr(evaluation, name)
        yield (
            f"sampling.cfg.{name} is {mine} but evaluation.cfg.{name} is {other}; a policy trained with guidance is "
            "judged with the same: give both one value"
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
    second_copy = config.objective.uses_reference and not config.learner.lora
    if config.learner.zero_stage == 3 and config.learner.reference_on_host and second_copy:
        yield (
            "learner.zero_stage is 3 but learner.reference_on_host exchanges whole weights; take stage 2, or "
            "objective.regulariser=none with objective.text_kl=0, which needs no reference"
        )
    if config.learner.ranks > 1 and 0 < config.learner.gpus <= 0.5:
        yield (
            f"learner.gpus is {config.learner.gpus:g} but learner.ranks is {config.learner.ranks}; Ray puts as many "
            "ranks on a GPU as fit, and NCCL refuses two there: give more than 0.5"
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
    gpus = (own or rollout).gpus
    if rollout.tensor_parallel > 1 and gpus < 1:
        yield (
            f"rollout.tensor_parallel is {rollout.tensor_parallel} but {'rollout.reasoner_actor' if own else 'rollout'}"
            f".gpus is {gpus:g}; each part of vLLM needs a GPU of its own: give 1, or tensor_parallel=1"
        )
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
        for name in _secrets(scorer.options, f"rewards.{place}.options"):
            # Without the value: messages go to logs.
            yield (
                f"{name} looks like a secret, which config.yaml would show; let the scorer read it from an environment "
                "variable and give that variable's name"
            )


def _secrets(value: object, name: str) -> Iterator[str]:
    """Names of texts that are, or of addresses that hold, what nobody else may know."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secrets(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _secrets(inner, f"{name}.{index}")
    elif isinstance(value, str) and (_names_secret(name.rpartition(".")[2]) or _holds_secret(value)):
        yield name


def _names_secret(name: str) -> bool:
    return bool(SECRET.search(re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _holds_secret(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    asked = any(_names_secret(key) for key, _ in parse_qsl(parts.query))
    return bool(parts.scheme and (parts.username or parts.password or asked))


def _weights(config: TrainConfig) -> Iterator[str]:
    if not any(scorer.weight for scorer in config.rewards):
        names = ", ".join(scorer.name for scorer in config.rewards)
        yield f"rewards has no scorer with a weight other than 0 ({names}), so all chains score alike; give one one"


def _objective(config: TrainConfig) -> Iterator[str]:
    s, o = config.sampling, config.objective
    if not s.think and (o.text_weight or o.text_kl):
        yield (
            f"sampling.think is false but objective.text_weight is {o.text_weight:g} and objective.text_kl is "
            f"{o.text_kl:g}; there are no tokens to train: set both to 0"
        )
    if o.text_weight == 0 and o.image_weight == 0:
        yield "objective.text_weight and objective.image_weight are both 0; nothing would be trained"
    if 0 < o.text_importance_cap < 1:
        yield (
            f"objective.text_importance_cap is {o.text_importance_cap:g}, which would weigh down tokens on whose "
            "log-probs vLLM and the learner agree; give at least 1 (2 is usual), or 0 for none"
        )
    if o.image_reweight and s.window_size == 1:
        yield (
            "objective.image_reweight is true but sampling.window_size is 1; it weighs the steps of a window against "
            "each other: make the window larger or leave it out"
        )
    if o.epochs > 1 and config.max_staleness:
        yield (
            f"objective.epochs is {o.epochs} but max_staleness is {config.max_staleness}; the old means of stale "
            "chains are the rollout's, not the learner's, and further epochs would clip on the difference: set epochs "
            "to 1 or max_staleness to 0"
        )


def _refl(config: TrainConfig) -> Iterator[str]:
    if config.algorithm != "refl":
        return
    if weight := config.objective.text_weight:
        yield f"objective.text_weight is {weight:g} but algorithm refl leaves the text alone; set it to 0"
    if not any(scorer.weight > 0 for scorer in config.rewards if scorer.name == "shapes_learned"):
        yield (
            "algorithm is refl but rewards has no shapes_learned of a weight above 0, whose score it makes larger; "
            "add it"
        )
    if rounds := config.data.refill_rounds:
        yield (
            f"data.refill_rounds is {rounds} but algorithm refl learns from groups that score alike, too; set it to 0"
        )


def _rates(config: TrainConfig) -> Iterator[str]:
    rates = config.optimizer
    if not rates.groups:  # with groups, the policy's parameters decide
        halves = {"reasoning": rates.lr_reasoning, "denoising": rates.lr_denoising}
        yield from unreached(config.objective, {half for half, rate in halves.items() if rate} - {*rates.frozen})


def unreached(objective: Objective, trained: Collection[str], image_trains_reasoning: bool = True) -> Iterator[str]:
    """Objectives with a weight that reach no half of the policy of which something is trained."""
    by_image = image_trains_reasoning and objective.image_grad_to_reasoning
    text, image = ("reasoning",), ("denoising", *(["reasoning"] if by_image else []))
    for field, halves in (("text_weight", text), ("text_kl", text), ("image_weight", image)):
        weight = getattr(objective, field)
        if weight and not any(half in trained for half in halves):
            yield (
                f"objective.{field} is {weight:g} but nothing that it reaches is trained ({' and '.join(halves)}: "
                "optimizer.frozen, or learning rates of 0); train some of it, or set the weight to 0"
            )
    if objective.regulariser != "none" and not any(half in trained for half in image):
        yield (
            f"objective.regulariser is {objective.regulariser} but nothing that moves a velocity is trained "
            f"({' and '.join(image)}: optimizer.frozen, or learning rates of 0); set it to none"
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
