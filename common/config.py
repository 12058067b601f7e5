"""The run's configuration: typed, validated before anything starts, importable without torch, vLLM or Ray."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.contradictions import contradictions
from common.hardware import cpu_has_bfloat16

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_REQUESTS = 256  # of a reasoner, decoded at once

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Beta = Annotated[float, Field(ge=0, lt=1)]


DType = Literal["float32", "bfloat16"]


class ConfigError(ValueError):
    """Bad input; the message names the field, the value and the remedy."""


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Resources(Section):
    """What Ray gives one actor; it runs as many math threads as whole CPUs it was given, at least one."""

    cpus: NonNegative = 1.0
    """CPUs of one actor. Actors that take turns may share a core, e.g. 0.4 each."""
    gpus: NonNegative = 0.0
    """GPUs of one actor."""
    custom: dict[str, Positive] = Field(default_factory=dict)
    """Custom Ray resources of one actor, e.g. {reward_node: 0.01} to keep it on the nodes that offer reward_node."""

    @property
    def asked(self) -> dict[str, float]:
        """The same by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.custom}


def native_dtype(section: dict[str, Any]) -> DType:
    """The compute type of a section of `Resources`, judged by its GPUs or by the CPU of the machine that reads it."""
    return "bfloat16" if section.get("gpus") or cpu_has_bfloat16() else "float32"


class Model(Section):
    """The policy to train."""

    path: str = "deploy/models/shapes"
    """Checkpoint directory in BAGEL's layout or, with `pipeline`, of a causal language model in transformers';
    relative to the working directory or to the repository."""
    pipeline: str | None = None
    """Directory of a diffusers flow-matching pipeline that draws what the language model writes (SD3, FLUX.1,
    Qwen-Image); a checkpoint of such a policy holds both and needs only `path`."""
    guidance: NonNegative = 3.5
    """What a guidance-distilled pipeline (FLUX.1 dev) is told in place of a second branch; others ignore it."""
    system_prompt: str = ""
    """System prompt before every prompt; "bagel-think" is BAGEL's think mode, "rewrite-think" asks a language model for
    a plan and, after it, the prompt to draw."""
    height: Count = 32
    """Image height in pixels."""
    width: Count = 32
    """Image width in pixels."""


class Data(Section):
    """Prompts."""

    train: str = "common/shapes/data/train.jsonl"
    """Training prompts, JSONL or Parquet with prompt, tag, include, exclude."""
    heldout: str = "common/shapes/data/heldout.jsonl"
    """Held-out prompts of the same form, for evaluation only."""
    prompts_per_step: Count = 8
    """Prompts (groups) in one training step."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Chains per prompt."""
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    """Dynamic sampling (DAPO): rounds in which groups whose chains all scored alike are replaced by other prompts; 0
    masks them only."""


class Cfg(Section):
    """Classifier-free guidance with BAGEL's renormalisations (common/bagel/cfg.py)."""

    text_scale: Annotated[float, Field(ge=1)] = 1.0
    """Scale against a context without the prompt; 1 is no guidance at all (BAGEL's own default is 4)."""
    image_scale: Annotated[float, Field(ge=1)] = 1.0
    """Scale against a context without the reasoning, on top of text_scale > 1; 1 leaves this branch out."""
    interval: tuple[float, float] = (0.4, 1.0)
    """Guided are the times t with low < t <= high."""
    renorm: Literal["global", "channel", "text_channel"] = "global"
    """What is shrunk to the unguided norm: an image, each of its tokens, or each token before the image guidance."""
    renorm_min: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least factor of that shrinking."""

    @property
    def enabled(self) -> bool:
        """BAGEL guides only where the text is."""
        return self.text_scale > 1


class Sampling(Section):
    """How chains are sampled."""

    max_tokens: Count = 64
    """Longest reasoning, EOS included."""
    max_prompt_tokens: Count = 256
    """Longest prompt, system prompt and chat tokens included; bounds the reasoning engine's memory."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Temperature of the reasoning; the policy's own distribution is 1, and vLLM samples from 0.01 on."""
    points: Annotated[int, Field(ge=2)] = 11
    """Time points of the training schedule; steps are one fewer."""
    shift: Positive = 3.0
    """Timestep shift s of t' = s t / (1 + (s - 1) t)."""
    sampler: Literal["flow_sde", "flow_cps", "dance"] = "flow_sde"
    """How a window step is drawn: FlowGRPO's SDE, Flow-CPS, or DanceGRPO's SDE of constant noise."""
    noise_level: NonNegative = 0.7
    """a of the sampler; for flow_sde in sigma_t = a sqrt(t / (1 - t))."""
    window_size: Count = 3
    """Steps of the SDE window, the only ones that are trained."""
    window_range: tuple[int, int] = (0, 5)
    """Range of steps the window lies in, both ends included."""
    window_schedule: Literal["group", "step", "progressive"] = "group"
    """Where the window starts: drawn once per group, once per training step for all groups, or sliding through the
    range (the last two are MixGRPO's random and progressive)."""
    window_interval: Count = 25
    """Training steps after which a progressive window moves on by one."""
    shared_noise: bool = False
    """Whether the chains of a group start from the same noise; the window's noise is always each chain's own."""
    cfg: Cfg = Cfg()
    """Guidance of training rollouts and of the learner's forward. The documented way is none: one context, one branch;
    it is here for the ablation."""
    think: bool = True
    """Whether the policy reasons before it draws; without, the image is conditioned on the prompt alone."""


class Objective(Section):
    """What is maximised: J_text + lambda J_image - w R."""

    advantage_std: Literal["group", "global", "none"] = "group"
    """What the centred reward is divided by."""
    advantage_clip: Positive = 5.0
    """Bound on the absolute advantage."""
    reward_normalisation: Literal["none", "group"] = "none"
    """Several rewards are summed as they are, or each normalised within its group first; with advantage_std: global
    that is GDPO."""
    text_clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the text ratio, 1 - this."""
    text_clip_high: Positive = 0.2
    """Upper clip of the text ratio, 1 + this."""
    text_kl: NonNegative = 0.0
    """Weight of the k3 KL to the reference; 0 as in the paper."""
    text_aggregation: Literal["chain_mean", "token_mean", "constant_length"] = "chain_mean"
    """What a chain's sum over tokens is divided by: its own length, the batch's mean length (all tokens count alike,
    DAPO), or sampling.max_tokens (Dr.GRPO)."""
    text_ratio: Literal["token", "sequence"] = "token"
    """Ratio of each token, or one per reasoning, the geometric mean over its tokens (GSPO)."""
    text_importance_cap: NonNegative = 0.0
    """Cap of the importance weight of vLLM's log-probs against the learner's (TIS; 2 is usual); 0 is off. Stale
    reasoning has no such weight: its ratio is taken against vLLM's log-probs themselves."""
    mask_truncated: bool = False
    """Leave reasoning that was cut at sampling.max_tokens out of the text objective."""
    image_clip: Positive | Literal["scaled"] = "scaled"
    """Clip of the log image ratio; "scaled" is the paper's 1e-6 times sqrt(262144 / latent size)."""
    image_weight: NonNegative = 1.0
    """lambda, the weight of the image objective."""
    text_weight: NonNegative = 1.0
    """Weight of the text objective; 0 trains the image half alone."""
    ratio_norm: bool = True
    """RatioNorm instead of the plain log ratio."""
    image_trust: Literal["clip", "kl"] = "clip"
    """What bounds an image update: the clip of the ratio, or a mask by the exact KL of the step (Flow-DPPO)."""
    image_kl_bound: Positive = 1e-5
    """KL to the old policy's step, mean over latent dimensions, beyond which image_trust: kl stops an update that
    leads further away."""
    image_reweight: bool = False
    """GRPO-Guard's re-weight: window steps count with 1/dt, scaled to mean 1 over the window, as UniRL has it."""
    regulariser: Literal["velocity_mse", "latent_kl", "none"] = "velocity_mse"
    """R: mean ||v - v_ref||^2, the KL of the steps ||mu - mu_ref||^2 / (2 s^2), or nothing (and no reference)."""
    regulariser_weight: Positive = 1.5e-5
    """w, the weight of R."""
    image_grad_to_reasoning: bool = True
    """Whether the image loss reaches the reasoning expert through its keys and values."""
    epochs: Count = 1
    """Passes over a step's chains (the paper: 2)."""
    minibatches: Count = 1
    """Optimizer steps per pass."""

    @property
    def uses_reference(self) -> bool:
        """Whether the update asks the starting policy, too."""
        return self.regulariser != "none" or bool(self.text_kl)


class ParameterGroup(Section):
    """Parameters with a learning rate of their own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    """Name of the group, in the table of parameters and in the metric grad_norm/NAME."""
    pattern: str
    """Which parameters, by name, e.g. "*.embed_tokens.*"; with learner.lora these are the adapters' names."""
    lr: NonNegative
    """Their learning rate."""


class Optimizer(Section):
    """AdamW with one learning rate per half, or per named group of parameters."""

    lr_reasoning: NonNegative = 3e-4
    """Learning rate of the understanding expert, embeddings and head."""
    lr_denoising: NonNegative = 1e-4
    """Learning rate of the generation expert and the latent projections."""
    groups: tuple[ParameterGroup, ...] = ()
    """Groups with learning rates of their own: a parameter is in the first whose pattern fits, or else in its half;
    `--dry-run` and the run's parameters.txt list which is where."""
    frozen: tuple[str, ...] = ()
    """What stays as it is: the groups reasoning or denoising, or patterns of parameter names such as
    "*.embed_tokens.*"; `--dry-run` prints which parameter falls where."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    grad_clip: NonNegative = 1.0
    """Global gradient-norm clip; 0 is off."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; Adam's first steps are as long as its rate allows whatever the gradient's noise."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine to 0 at the last step."""

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """What every learning rate is multiplied with at a step of a run of `steps`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) if self.schedule == "cosine" else 1.0
        return warm * decay


class ReasonerResources(Resources):
    """An actor for vLLM alone."""

    cpus: NonNegative = 0.4
    """CPUs of one reasoner."""
    gpus: NonNegative = 0.0
    """GPUs of one reasoner, for each of tensor_parallel."""


class Rollout(Resources):
    """Replicas that generate."""

    cpus: NonNegative = 0.4
    """CPUs of one replica."""
    replicas: Count = 2
    """Rollout actors at the start; `unigrpo scale` changes the number of a live run."""
    min_replicas: Count | None = None
    """Replicas that must be up before the run begins, and that idle ones never fall below; none: `replicas`."""
    max_replicas: Count | None = None
    """While work is queued, more replicas up to this are asked for, which Ray's autoscaler sees; none: `replicas`."""
    idle_s: Positive = 300.0
    """A replica beyond min_replicas leaves after this many seconds without work."""
    reasoner_actor: ReasonerResources | None = None
    """Give vLLM an actor of its own, beside each replica, which then draws only; none: vLLM runs in the replica."""
    tensor_parallel: Count = 1
    """GPUs vLLM spreads one replica's reasoning expert over."""
    groups_per_call: Count = 4
    """Groups one replica generates together; a free replica takes the next ones."""
    dtype: DType = Field(default_factory=native_dtype)
    """Compute type of vLLM and of the denoiser. Without it bfloat16 if the hardware multiplies that, else float32."""
    kv_cache_mb: Count = 64
    """vLLM's KV cache on CPUs."""
    gpu_memory_utilization: Positive = 0.4
    """vLLM's share of a GPU."""
    transport: Literal["object_store", "collective"] = "object_store"
    """How weights travel: through Ray's object store, each replica by itself, or by broadcast to all replicas at once
    (NCCL on GPUs, gloo on CPUs), for large models."""
    bucket_mb: Count = 256
    """MiB of one bucket of weights; no process holds more than one beside its model."""
    deadline_s: Positive = 600.0
    """Longest wait for one call to a replica."""

    @property
    def patience_s(self) -> float:
        """Longest wait for any group: a call that hangs may have to end first, and its work be done by another."""
        return 2 * self.deadline_s + 60

    @property
    def actors(self) -> dict[str, Resources]:
        """The actors of one replica and what each is given, all GPUs of vLLM's workers counted."""
        own = self.reasoner_actor
        with_engine = own or self
        spread = Resources(
            cpus=with_engine.cpus, gpus=with_engine.gpus * self.tensor_parallel, custom=with_engine.custom
        )
        if own is None:
            return {"rollout": spread}
        return {"rollout": Resources(cpus=self.cpus, gpus=self.gpus, custom=self.custom), "reasoner": spread}


class Lora(Section):
    """Low-rank adapters in place of full fine-tuning."""

    rank: Count = 16
    """Rank of the update of each layer."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("q_proj_moe_gen", "k_proj_moe_gen", "v_proj_moe_gen", "o_proj_moe_gen"),
        *("to_q", "to_k", "to_v", "to_out.0"),
    )
    """Last parts of the names of the linear layers that get one; both halves need some. The default is the attention
    of language models, of BAGEL's generation expert and of diffusers' transformers."""


class Learner(Resources):
    """Ranks that update."""

    cpus: NonNegative = 0.4
    """CPUs of one rank."""
    ranks: Count = 2
    """Data-parallel DeepSpeed ranks."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage; 3 also shards the compute weights, which every layer gathers when it runs. Micro-batches
    add up their gradients in fp32, at stage 1 in the compute type."""
    dtype: DType = Field(default_factory=native_dtype)
    """Compute type, chosen like rollout.dtype; masters are always fp32."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the weights themselves; {} takes the defaults."""
    chains_per_micro_batch: Count = 64
    """Chains in one forward and backward of a rank."""
    reference_on_host: bool = False
    """Keep the reference in host memory and exchange it with the policy once per batch; saves a model's memory."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward: a third more operations, a small part of the memory."""
    deadline_s: Positive = 600.0
    """Longest wait for an update or a collective."""


class Reward(Resources):
    """One reward: a pool of actors of its own."""

    name: str
    """Scorer's name, e.g. shapes or clip_score."""
    weight: float = 1.0
    """Weight in the sum of rewards; refl follows the learned scorer alone, whatever its weight above 0."""
    replicas: Count = 1
    """Actors of this scorer."""
    cpus: NonNegative = 0.2
    """CPUs of one actor."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the scorer, which checks them."""
    deadline_s: Positive = 120.0
    """Longest wait for one group's score, per try."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further tries after a failure; then the chain is masked and counted."""


class Evaluation(Section):
    """Held-out evaluation with deterministic denoising."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step only."""
    images_per_prompt: Count = 4
    """Images per held-out prompt."""
    prompts: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts used, evenly over tags; 0 is all."""
    points: Annotated[int, Field(ge=2)] = 21
    """Time points of the evaluation schedule."""
    cfg: Cfg = Cfg()
    """Guidance of evaluation and `unigrpo generate`."""
    seed: Seed = 1234
    """Seed of the evaluation's noise and sampling, the same for every checkpoint."""
    samples: Count = 14
    """Held-out prompts shown in the report."""


class Checkpoints(Section):
    """What is kept for --resume."""

    every: Annotated[int, Field(ge=0)] = 20
    """Steps between checkpoints; 0 writes only the last."""
    keep: Count = 2
    """Newest checkpoints kept, besides the one with the highest mean reward over the steps before it."""


class Recording(Section):
    """What is written for people and for replay."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl and Ray's metrics."""
    rollouts_every: Annotated[int, Field(ge=0)] = 10
    """Steps between rollouts written as Parquet; 0 writes none."""
    latents: bool = False
    """Also write the window's latents, so that a step can be replayed into the learner."""
    timeline_every: Annotated[int, Field(ge=0)] = 0
    """Steps between timelines (Chrome traces) written; 0 writes those that `unigrpo timeline` asks for."""


class TrainConfig(Section):
    """One run."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "shapes"
    """Name of the run and of its directory under runs_dir."""
    runs_dir: str = "runs"
    """Where run directories are made; a relative path starts at $UNIGRPO_HOME, see docs/cluster.md."""
    seed: Seed = 0
    """Seed of everything random."""
    steps: Annotated[int, Field(ge=0)] = 100
    """Training steps; 0 only evaluates."""
    max_minutes: NonNegative = 0.0
    """Stop after the step that passes this many minutes of training; 0 is no limit."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many versions a rollout may be behind the update that uses it; 0 is on-policy."""
    self_test: bool = True
    """Before the first update, and after every resume, compare a few chains as rollout and learner see them, and refuse
    to train if they differ by more than rounding (bounds in learner/self_test.py)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a reward, a loss or a gradient is NaN or infinite: stop, or leave the chains or the update out
    and count them; the weights are never touched."""
    algorithm: Literal["unigrpo", "refl"] = "unigrpo"
    """What makes an update of scored chains: the clipped objectives, or for the image half ReFL (learner/refl.py),
    which follows the gradient of the learned scorer of shapes."""
    model: Model = Model()
    data: Data = Data()
    sampling: Sampling = Sampling()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    rollout: Rollout = Rollout()
    learner: Learner = Learner()
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)] = (Reward(name="shapes"),)
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    recording: Recording = Recording()

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return run_path(self.runs_dir) / self.run_name

    @property
    def chains_per_step(self) -> int:
        return self.data.prompts_per_step * self.data.group_size

    @property
    def reasoner_batch(self) -> int:
        """Most requests that a replica's reasoner decodes at once."""
        return min(MOST_REQUESTS, self.rollout.groups_per_call * self.data.group_size)

    @property
    def replica_bounds(self) -> tuple[int, int]:
        """Fewest and most rollout replicas."""
        rollout = self.rollout
        return rollout.min_replicas or rollout.replicas, rollout.max_replicas or rollout.replicas

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        for contradiction in contradictions(self):
            raise ValueError(contradiction)
        return self


def in_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def run_path(path: str | Path) -> Path:
    """A path of runs, absolute, so that it means the same in every actor.

    A relative one starts at $UNIGRPO_HOME. Without that variable it starts at the working directory, or, in a Ray job,
    at the home directory: the working directory of a job is a copy that Ray deletes.
    """
    base = os.environ.get("UNIGRPO_HOME") or (Path.home() if in_job() else Path())
    return (Path(base) / path).absolute()


def resolve_path(path: str) -> Path:
    """A path of a recipe: as it is, relative to the working directory, or relative to the repository."""
    for base in (Path(), REPOSITORY):
        if (base / path).exists():
            return (base / path).resolve()
    raise ConfigError(f"{path} does not exist (looked in {Path().resolve()} and in the repository); correct the path")
