"""Memory of every actor and time of a step, from a recipe, the policy's configuration files and stated rates.

Nothing is loaded or measured. Memory follows what the actors allocate: vLLM its share of the GPU, the denoiser the
whole policy, a learner rank the weights, its shard of fp32 masters and AdamW's moments, gradients and activations. Time
counts operations and bytes at a fraction of the data sheet's rates. Reward actors are not planned.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config import ConfigError, TrainConfig
from common.sizes import ChainShape, Sizes, describing, elsewhere, sizes_of
from deploy.devices import Device, Fleet
from deploy.preflight import demands

GB = 1e9
# What large matrix products, and reads of all weights, were seen to reach of a data sheet's rates.
MATRIX_EFFICIENCY, READ_EFFICIENCY = 0.5, 0.7


@dataclass(frozen=True)
class ActorMemory:
    """Bytes of one actor by what holds them; share: the part of a device it may use; remarks for people."""

    kind: str
    count: int
    share: float
    parts: dict[str, float]
    remarks: tuple[str, ...] = ()
    fault: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def number_bytes(dtype: str) -> int:
    """Bytes of one number."""
    return 4 if dtype == "float32" else 2


def chain_shape(config: TrainConfig, sizes: Sizes, tokens: int | None = None) -> ChainShape:
    """A chain with the longest prompt allowed, and `tokens` of reasoning or the most allowed, if any."""
    s = config.sampling
    scored = (s.max_tokens if tokens is None else tokens) if s.think else 0
    return ChainShape(
        s.max_prompt_tokens + scored,
        scored,
        sizes.image_tokens(config.model.height, config.model.width),
        s.window_size,
    )


def replica_memory(config: TrainConfig, sizes: Sizes, device: Device | None) -> list[ActorMemory]:
    """One replica: the denoiser's actor, which holds vLLM too unless that has an actor of its own."""
    rollout, width = config.rollout, number_bytes(config.rollout.dtype)
    chain = chain_shape(config, sizes)
    images = rollout.groups_per_call * config.data.group_size
    drawing: dict[str, float] = {
        "denoiser": (sizes.denoiser + sizes.counts.held - sizes.counts.policy) * width,  # with adapters, if there are
        "frozen parts": sizes.frozen_bytes(width),
        "drawing": max(
            images * sizes.drawing_bytes(chain.image, chain.text, width),
            sizes.decoding_bytes(images, chain.image, width),
        ),
    }
    aside = [f"in host memory: {sizes.host * width / GB:.3g} GB of the language model"] if sizes.host else []
    if not config.sampling.think:
        return [ActorMemory("rollout", rollout.replicas, min(1.0, rollout.gpus), drawing, tuple(aside))]
    engine, remarks, fault = _engine(config, sizes, device)
    twice = sizes.twice * width / GB
    where = "the replica" if rollout.reasoner_actor is None else "the two actors"
    if twice:
        remarks.append(
            f"vLLM and the denoiser both hold the reasoning expert: {twice:.3g} GB of {where} are held twice"
        )
    if rollout.reasoner_actor is None:
        return [
            ActorMemory(
                "rollout", rollout.replicas, min(1.0, rollout.gpus), drawing | engine, (*remarks, *aside), fault
            )
        ]
    own = min(1.0, rollout.reasoner_actor.gpus)
    return [
        ActorMemory("rollout", rollout.replicas, min(1.0, rollout.gpus), drawing, tuple(aside)),
        ActorMemory("reasoner", rollout.replicas, own, engine, tuple(remarks), fault),
    ]


def _engine(config: TrainConfig, sizes: Sizes, device: Device | None) -> tuple[dict[str, float], list[str], str]:
    """vLLM's memory on one GPU, of which it takes gpu_memory_utilization for weights and KV cache, remarks, a fault."""
    rollout, width = config.rollout, number_bytes(config.rollout.dtype)
    chain = chain_shape(config, sizes)
    weights = sizes.reasoner * width / rollout.tensor_parallel
    sequence = chain.text * sizes.kv_numbers * width / rollout.tensor_parallel
    batch = config.reasoner_batch
    if not rollout.gpus:
        cache = float(rollout.kv_cache_mb << 20)
    elif device is None:
        cache = batch * sequence
    else:
        cache = max(0.0, rollout.gpu_memory_utilization * device.memory_gb * GB - weights)
    fits = int(cache // sequence)
    remarks = [f"KV cache holds {fits} of {batch} longest sequences at once"] if fits < batch else []
    fault = "" if fits else f"vLLM has no room for one sequence of {chain.text} tokens; raise its memory"
    return {"reasoner": weights, "KV cache": cache}, remarks, fault


def learner_memory(config: TrainConfig, sizes: Sizes) -> ActorMemory:
    """One rank. ZeRO shards masters and moments over ranks, from stage 2 the gradients, from stage 3 the weights."""
    learner, width = config.learner, number_bytes(config.learner.dtype)
    trained, ranks, stage = sum(sizes.counts.trainable.values()), learner.ranks, learner.zero_stage
    on_host = config.objective.uses_reference and learner.reference_on_host and not learner.lora
    micro = min(learner.chains_per_micro_batch, -(-config.chains_per_step // ranks))
    activations = micro * sizes.training_bytes(chain_shape(config, sizes), width, learner.activation_checkpointing)
    # The activations are gone when the step makes, one role after the other, Adam's denominators or at stage 1 a flat
    # copy of the gradients and that in fp32.
    stepping = max(sizes.counts.trainable.values()) * (4 if stage >= 2 else width + 4) / ranks
    return ActorMemory(
        "learner",
        ranks,
        min(1.0, learner.gpus),
        {
            "weights": sizes.counts.held * width / (ranks if stage == 3 else 1),
            "reference": sizes.counts.policy * width * holds_reference(config),
            "optimizer": trained * 12 / ranks,
            "gradients": trained * 4 / ranks if stage >= 2 else trained * width,
            "activations": max(activations, stepping),
            "frozen parts": sizes.frozen_bytes(number_bytes(config.rollout.dtype)),
        },
        (f"in host memory: {sizes.counts.policy * width / GB:.3g} GB of the reference",) if on_host else (),
    )


def holds_reference(config: TrainConfig) -> bool:
    """Whether a rank has a second policy on its device; adapters are switched off instead."""
    return config.objective.uses_reference and not config.learner.reference_on_host and not config.learner.lora


def actor_memory(config: TrainConfig, sizes: Sizes, device: Device | None = None) -> list[ActorMemory]:
    """The planned actors of a run."""
    return [*replica_memory(config, sizes, device), learner_memory(config, sizes)]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step; with staleness, rollout and update of different steps run side by side."""

    reasoning: float
    drawing: float
    update: float
    sync: float
    overlapped: bool

    @property
    def total(self) -> float:
        rollout = self.reasoning + self.drawing
        return (max(rollout, self.update) if self.overlapped else rollout + self.update) + self.sync


def step_time(config: TrainConfig, sizes: Sizes, device: Device, tokens: int | None = None) -> StepTime:
    """tokens: mean length of the reasoning; without it every reasoning is as long as allowed."""
    published = sum(sizes.counts.trainable.values()) * number_bytes(config.rollout.dtype)
    return StepTime(
        *_rollout_time(config, sizes, device, tokens),
        _update_time(config, sizes, device, tokens),
        published / (device.link_gbs * GB * READ_EFFICIENCY),
        config.max_staleness > 0,
    )


def _rate(device: Device) -> float:
    """Operations per second of one actor; actors that share a device on-policy take turns on it."""
    return device.tflops * 1e12 * MATRIX_EFFICIENCY


def _rollout_time(config: TrainConfig, sizes: Sizes, device: Device, tokens: int | None) -> tuple[float, float]:
    """Reasoning and drawing of one replica's chains, one call after the other."""
    rollout, width = config.rollout, number_bytes(config.rollout.dtype)
    chain = chain_shape(config, sizes, tokens)
    chains = config.chains_per_step / rollout.replicas
    batch = min(config.reasoner_batch, chains)
    tensor = rollout.tensor_parallel
    read = (sizes.reasoner + batch * chain.text * sizes.kv_numbers) * width / tensor
    iteration = max(
        read / (device.bandwidth_gbs * GB * READ_EFFICIENCY),
        batch * sizes.read_flops(1, 1) / (_rate(device) * tensor),
    )
    reasoning = chains / batch * chain.scored * (iteration + device.decode_s)
    steps = config.sampling.points - 1
    flops = steps * sizes.draw_flops(chain.image, chain.text) + sizes.read_flops(chain.text, 0)
    return reasoning, chains * flops / _rate(device)


def _update_time(config: TrainConfig, sizes: Sizes, device: Device, tokens: int | None) -> float:
    """Forward and backward of every epoch, the old policy's pass over minibatches after the first, the reference's."""
    learner, objective = config.learner, config.objective
    chain = chain_shape(config, sizes, tokens)
    forward = sizes.read_flops(chain.text, chain.scored) + chain.window * sizes.draw_flops(chain.image, chain.text)
    # Forward, gradients of what a layer takes, those of its weights unless they are frozen, forward again.
    passes: float = objective.epochs * (2 + (not learner.lora) + learner.activation_checkpointing)
    passes += 1 - 1 / objective.minibatches + objective.uses_reference
    return config.chains_per_step / learner.ranks * passes * forward / _rate(device)


@dataclass(frozen=True)
class Plan:
    """What `unigrpo plan` shows."""

    config: TrainConfig
    memory: list[ActorMemory]
    fleet: Fleet | None
    time: StepTime | None

    @property
    def faults(self) -> list[str]:
        """Why the run would not fit; empty where it does or where no device is named."""
        if self.fleet is None:
            return []
        asked = sum(demand.count * demand.given.gpus for demand in demands(self.config))
        found = []
        if asked > self.fleet.count + 1e-6:
            found.append(f"the actors ask for {asked:g} GPUs, there are {self.fleet.count}")
        for actor in self.memory:
            room = actor.share * self.fleet.device.memory_gb * GB
            if actor.share and actor.total > room:
                found.append(f"{actor.kind} needs {actor.total / GB:.1f} GB and may use {room / GB:.1f} GB of each GPU")
            if actor.share and actor.fault:
                found.append(f"{actor.kind}: {actor.fault}")
        return found

    def __str__(self) -> str:
        return "\n".join([*self._memory_lines(), *self._time_lines()])

    def _memory_lines(self) -> list[str]:
        lines = ["memory of one actor, GB"]
        for actor in self.memory:
            parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in actor.parts.items() if size)
            lines += [f"  {actor.count} x {actor.kind}: {actor.total / GB:.3g} = {parts}"]
            lines += [f"    {remark}" for remark in actor.remarks]
        lines += [
            f"  {path} is not here; sizes are those of {describing(path)}" for path in elsewhere(self.config.model)
        ]
        if self.fleet is None:
            return [*lines, "  --gpus COUNTxKIND, e.g. 8xH100-80GB, says whether it fits"]
        name = f"{self.fleet.count} x {self.fleet.kind}"
        return [*lines, *([f"does not fit {name}: {fault}" for fault in self.faults] or [f"fits {name}"])]

    def _time_lines(self) -> list[str]:
        if self.time is None or self.fleet is None:
            return []
        t, rollout = self.time, self.time.reasoning + self.time.drawing
        images = self.config.chains_per_step / rollout / self.config.rollout.replicas
        return [
            f"time of a step at {MATRIX_EFFICIENCY:.0%} of the stated matrix rate and {READ_EFFICIENCY:.0%} of the "
            "bandwidth, every reasoning as long as allowed, rewards left out",
            f"  {t.total:.3g} s = reasoning {t.reasoning:.3g}, drawing {t.drawing:.3g}, update {t.update:.3g}, "
            f"weights {t.sync:.2g}{'; rollout and update overlap' if t.overlapped else ''}",
            f"  {images:.3g} images per second and replica",
        ]


def make_plan(config: TrainConfig, fleet: Fleet | None) -> Plan:
    """ConfigError or CheckpointError where the policy's configuration is missing or does not fit the recipe."""
    sizes = sizes_of(config)
    try:
        sizes.image_tokens(config.model.height, config.model.width)
    except ValueError as error:
        raise ConfigError(f"model.height x model.width: {error}") from error
    on_gpus = fleet is not None and config.rollout.gpus and config.learner.gpus
    device = fleet.device if fleet else None
    return Plan(
        config,
        actor_memory(config, sizes, device),
        fleet,
        step_time(config, sizes, device) if on_gpus and device else None,
    )
