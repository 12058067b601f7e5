"""Sizes of a BAGEL checkpoint, read from its JSON files and checked before a tensor is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.checkpoint_files import CheckpointError, read_json


class _Sizes(BaseModel):
    # Released configs carry many keys that do not change the computation.
    model_config = ConfigDict(extra="ignore", frozen=True)


class LLMConfig(_Sizes):
    """Shape of the two-expert decoder (llm_config.json)."""

    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qk_norm: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    # Stated by released configs; other values would compute something else.
    hidden_act: Literal["silu"] = "silu"
    rope_scaling: None = None
    use_sliding_window: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _fill_head_dim(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("head_dim"):
            hidden, heads = data.get("hidden_size"), data.get("num_attention_heads")
            if isinstance(hidden, int) and isinstance(heads, int) and heads:
                data = {**data, "head_dim": hidden // heads}
        return data

    @model_validator(mode="before")
    @classmethod
    def _read_rope_parameters(cls, data: Any) -> Any:
        """How transformers 5 writes what was rope_theta and rope_scaling."""
        rope = data.get("rope_parameters") if isinstance(data, dict) else None
        if not isinstance(rope, dict):
            return data
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters has the rope_type {rope['rope_type']!r}; only 'default' is computed")
        theta = rope.get("rope_theta", data.get("rope_theta"))
        if theta is None:
            raise ValueError("rope_parameters has no rope_theta; copy llm_config.json again")
        if data.get("rope_theta", theta) != theta:
            raise ValueError(f"rope_theta is {data.get('rope_theta')} but rope_parameters says {theta}; correct one")
        return {**data, "rope_theta": theta}

    @model_validator(mode="after")
    def _check(self) -> LLMConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        return self


class ViTConfig(_Sizes):
    """Shape of the SigLIP tower (vit_config.json). num_hidden_layers counts SigLIP's last layer, which BAGEL leaves
    out."""

    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=1)
    num_attention_heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    image_size: int = Field(gt=0)
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        return self

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch (patch * patch * channels)."""
        return self.patch_size**2 * self.num_channels


class VAEConfig(_Sizes):
    """Geometry of the FLUX-style autoencoder. The defaults are the released one's, whose config.json omits most."""

    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @model_validator(mode="before")
    @classmethod
    def _check_downsample(cls, data: Any) -> Any:
        """The release states the factor as well as what it follows from."""
        if isinstance(data, dict) and isinstance(data.get("downsample"), int):
            levels = data.get("ch_mult", cls.model_fields["ch_mult"].default)
            if data["downsample"] != 2 ** (len(levels) - 1):
                raise ValueError(f"downsample={data['downsample']} is not what {len(levels)} levels in ch_mult give")
        return data

    @property
    def downsample(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.ch_mult) - 1))


class BagelConfig(_Sizes):
    """A whole checkpoint: config.json with llm_config.json and vit_config.json beside it."""

    llm_config: LLMConfig
    vit_config: ViTConfig | None = None
    visual_und: bool = True
    vit_max_num_patch_per_side: int = 70
    connector_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    interpolate_pos: Literal[False] = False
    vae_config: VAEConfig = VAEConfig()
    latent_patch_size: int = 2
    max_latent_size: int = 64
    timestep_shift: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> BagelConfig:
        if self.visual_und and self.vit_config is not None:
            side = self.vit_config.image_size // self.vit_config.patch_size
            if self.vit_max_num_patch_per_side > side:
                raise ValueError(
                    f"vit_max_num_patch_per_side={self.vit_max_num_patch_per_side} is more than the {side} patches "
                    f"a side that vit_config's image_size={self.vit_config.image_size} has positions for"
                )
        return self

    @property
    def understands_images(self) -> bool:
        """Whether the checkpoint has the understanding tower."""
        return self.visual_und and self.vit_config is not None

    @property
    def token_dim(self) -> int:
        """Numbers in one latent token (patch * patch * channels)."""
        return self.latent_patch_size**2 * self.vae_config.z_channels

    @property
    def pixels_per_token(self) -> int:
        """Pixels per latent token along one side."""
        return self.latent_patch_size * self.vae_config.downsample

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (rows, columns) of an image in pixels; ValueError if the image does not fit the grid."""
        side = self.pixels_per_token
        if height % side or width % side:
            raise ValueError(f"image size {height}x{width} is not a multiple of {side} pixels, one latent token")
        rows, cols = height // side, width // side
        if max(rows, cols) > self.max_latent_size:
            raise ValueError(
                f"image size {height}x{width} needs {rows}x{cols} tokens; max_latent_size is {self.max_latent_size}"
            )
        return rows, cols

    @classmethod
    def read(cls, directory: Path) -> BagelConfig:
        """Reads the JSON files. Raises CheckpointError naming file and field."""
        data = read_json(directory / "config.json")
        for part in ("llm_config", "vit_config"):
            file = directory / f"{part}.json"
            if file.exists():
                data[part] = read_json(file)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{directory}/config.json: {field or 'config'}: {first['msg']}") from error
