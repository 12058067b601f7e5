"""Configuration of the supervised stage; like common.config it imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from common.config import ConfigError, Count, DType, NonNegative, Positive, Resources, Section, Seed, native_dtype
from common.recipe import apply_overrides, explain, read_recipe


class Autoencoder(Section):
    """The autoencoder of a new policy."""

    z_channels: Count = 4
    """Latent channels."""
    ch: Annotated[int, Field(ge=32, multiple_of=32)] = 32
    """Base channels; group normalisation has 32 groups."""
    ch_mult: tuple[Count, ...] = (1, 1, 1)
    """Channel multiplier per level; each level after the first halves the image."""
    num_res_blocks: Count = 1
    """Residual blocks per level."""
    steps: Count = 800
    """Training steps."""
    batch: Count = 32
    """Images per step."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    kl: NonNegative = 1e-4
    """Weight of the KL term, per latent dimension."""
    images: Count = 8000
    """Rendered images it is fitted to."""


class Create(Section):
    """A new small policy; without this section the stage starts from a checkpoint."""

    vocab_size: Count = 768
    """Most entries of the byte-level BPE vocabulary."""
    llm_config: dict[str, Any]
    """Transformer sizes under BAGEL's names; vocab_size comes from the tokenizer."""
    latent_patch_size: Count = 2
    """Latents per token along one side."""
    max_latent_size: Count = 8
    """Side of the position table, in tokens."""
    timestep_shift: Positive = 3.0
    """Recorded in config.json."""
    autoencoder: Autoencoder = Autoencoder()


class SFTConfig(Resources):
    """Next-token loss on the reasoning and flow matching on the image."""

    out: str
    """Directory to write the checkpoint to; must not exist."""
    start: str | None = None
    """Checkpoint to start from."""
    create: Create | None = None
    """Or a new policy."""
    data: str = "shapes"
    """"shapes", or a Parquet file with columns prompt, reasoning, image."""
    examples: Count = 32000
    """Examples drawn from the shapes task, over all ranks."""
    think_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the shapes examples with reasoning; the others go from the prompt to the image, as rollouts with
    sampling.think = false do. In a Parquet file such rows have no reasoning (null)."""
    prompt_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the shapes examples with a text; the others teach the velocity without one, which guidance needs. In a
    Parquet file such rows have an empty prompt and no reasoning."""
    system_prompt: str = ""
    """System prompt before every prompt."""
    height: Count = 32
    """Image height in pixels."""
    width: Count = 32
    """Image width in pixels."""
    seed: Seed = 0
    """Seed of everything random."""
    steps: Count = 400
    """Optimizer steps."""
    batch: Count = 32
    """Texts per step and rank."""
    copies: Count = 8
    """Noised copies of each image."""
    lr: Positive = 1.2e-3
    """Peak learning rate."""
    warmup: Count = 40
    """Steps of linear warm-up; then cosine to 2 %."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """Averaging of the weights that are saved."""
    shift: Positive = 1.0
    """Timestep shift of the training noise; above 1 favours high noise."""
    text_weight: NonNegative = 1.0
    """Weight of the next-token loss."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay."""
    grad_clip: NonNegative = 1.0
    """Global gradient-norm clip."""
    save_every: Count = 1000
    """Steps between intermediate checkpoints, written to OUT-STEP."""
    ranks: Count = 2
    """Data-parallel ranks, each of which is given `cpus`, `gpus` and `custom`."""
    deadline_s: Positive = 1800.0
    """Longest wait of a rank for the others."""
    dtype: DType = Field(default_factory=native_dtype)
    """Compute type, chosen like rollout.dtype of a training recipe; masters are fp32."""
    zero_stage: Literal[1, 2] = 2
    """DeepSpeed ZeRO stage."""

    @model_validator(mode="after")
    def _check(self) -> SFTConfig:
        if (self.start is None) == (self.create is None):
            raise ValueError("give either start (a checkpoint) or create (sizes of a new policy)")
        if self.examples < self.batch * self.ranks:
            raise ValueError(f"examples is {self.examples}, fewer than one step's {self.batch * self.ranks} texts")
        return self


def load_sft_config(recipe: str, overrides: list[str]) -> SFTConfig:
    """Recipe plus overrides, validated. ConfigError names the field, the value and the remedy."""
    try:
        return SFTConfig.model_validate(apply_overrides(read_recipe(recipe), overrides))
    except ValidationError as error:
        raise ConfigError(explain(error, SFTConfig)) from error
