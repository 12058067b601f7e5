"""The FLUX-style autoencoder: diffusers' AutoencoderKL, stored under the names of ae.safetensors.

The released file uses the layout of the original latent-diffusion code; diffusers names the same tensors otherwise.
`to_diffusers` and `from_diffusers` rename one into the other; attention projections are 1x1 convolutions in the file
and linear layers in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.bagel.config import BagelConfig, VAEConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Pixels decoded at once: one image of 1024 x 1024, whose widest activations are about 4 GB in fp32.
DECODED_PIXELS = 1 << 20


def build_vae(config: VAEConfig) -> AutoencoderKL:
    """An AutoencoderKL of the given geometry with random weights."""
    from diffusers import AutoencoderKL

    levels = len(config.ch_mult)
    return AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_ch,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * m for m in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def load_vae(config: VAEConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> AutoencoderKL:
    """The frozen autoencoder with these numbers (ae.safetensors' names), copied to the device in fp32."""
    with torch.device("meta"):
        vae = build_vae(config)
    renamed = to_diffusers(weights, len(config.ch_mult))
    vae.load_state_dict({k: v.to(device, torch.float32, copy=True) for k, v in renamed.items()}, assign=True)
    return vae.requires_grad_(False).eval()


def vae_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in ae.safetensors, known without importing diffusers, which takes seconds."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, out: int, *inward: int) -> None:
        shapes.update({f"{name}.weight": (out, *inward), f"{name}.bias": (out,)})

    def block(name: str, channels: int, out: int) -> int:
        layer(f"{name}.norm1", channels)
        layer(f"{name}.conv1", out, channels, 3, 3)
        layer(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3, 3)
        if channels != out:
            layer(f"{name}.nin_shortcut", out, channels, 1, 1)
        return out

    def middle(half: str, channels: int) -> None:
        for number in (1, 2):
            block(f"{half}.mid.block_{number}", channels, channels)
        layer(f"{half}.mid.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{half}.mid.attn_1.{part}", channels, channels, 1, 1)

    widths = [config.ch * multiple for multiple in config.ch_mult]
    last = len(widths) - 1
    channels = widths[0]
    layer("encoder.conv_in", channels, config.in_channels, 3, 3)
    for level, width in enumerate(widths):
        for number in range(config.num_res_blocks):
            channels = block(f"encoder.down.{level}.block.{number}", channels, width)
        if level < last:
            layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder", channels)
    layer("encoder.norm_out", channels)
    layer("encoder.conv_out", 2 * config.z_channels, channels, 3, 3)

    layer("decoder.conv_in", channels, config.z_channels, 3, 3)
    middle("decoder", channels)
    for level, width in reversed(list(enumerate(widths))):
        for number in range(config.num_res_blocks + 1):
            channels = block(f"decoder.up.{level}.block.{number}", channels, width)
        if level > 0:
            layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    layer("decoder.norm_out", channels)
    layer("decoder.conv_out", config.out_ch, channels, 3, 3)
    return shapes


def _rules(levels: int) -> list[tuple[str, str]]:
    """(file, diffusers) name templates with {0}, {1}, ... for the numbers."""
    rules = []
    for level in range(levels):
        up = levels - 1 - level
        rules += [
            (f"encoder.down.{level}.block.", f"encoder.down_blocks.{level}.resnets."),
            (f"encoder.down.{level}.downsample.", f"encoder.down_blocks.{level}.downsamplers.0."),
            (f"decoder.up.{up}.block.", f"decoder.up_blocks.{level}.resnets."),
            (f"decoder.up.{up}.upsample.", f"decoder.up_blocks.{level}.upsamplers.0."),
        ]
    for half in ("encoder", "decoder"):
        rules += [
            (f"{half}.mid.block_1.", f"{half}.mid_block.resnets.0."),
            (f"{half}.mid.block_2.", f"{half}.mid_block.resnets.1."),
            (f"{half}.mid.attn_1.norm.", f"{half}.mid_block.attentions.0.group_norm."),
            (f"{half}.mid.attn_1.q.", f"{half}.mid_block.attentions.0.to_q."),
            (f"{half}.mid.attn_1.k.", f"{half}.mid_block.attentions.0.to_k."),
            (f"{half}.mid.attn_1.v.", f"{half}.mid_block.attentions.0.to_v."),
            (f"{half}.mid.attn_1.proj_out.", f"{half}.mid_block.attentions.0.to_out.0."),
            (f"{half}.norm_out.", f"{half}.conv_norm_out."),
        ]
    return rules


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for source, target in rules:
        if name.startswith(source):
            return target + name[len(source) :]
    return name


def to_diffusers(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """ae.safetensors' names -> AutoencoderKL's."""
    out = {}
    for name, tensor in weights.items():
        new = _rename(name, _rules(levels)).replace(".nin_shortcut.", ".conv_shortcut.")
        linear = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight$", new)
        out[new] = tensor[:, :, 0, 0] if linear and tensor.ndim == 4 else tensor
    return out


def from_diffusers(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """AutoencoderKL's names -> ae.safetensors'."""
    back = [(target, source) for source, target in _rules(levels)]
    out = {}
    for name, tensor in weights.items():
        conv = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight$", name)
        new = _rename(name, back).replace(".conv_shortcut.", ".nin_shortcut.")
        out[new] = (tensor[:, :, None, None] if conv else tensor).contiguous()
    return out


def pack(latent: Tensor, patch: int) -> Tensor:
    """[M, C, h, w] -> tokens [M, h/p * w/p, p*p*C]: row-major, channel fastest inside a token."""
    m, c, h, w = latent.shape
    x = latent.reshape(m, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(m, (h // patch) * (w // patch), patch * patch * c)


def unpack(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `pack`: tokens [M, rows*cols, p*p*C] -> [M, C, rows*p, cols*p]."""
    m, _, d = tokens.shape
    (rows, cols), c = grid, tokens.shape[-1] // patch**2
    x = tokens.reshape(m, rows, cols, patch, patch, d // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(m, c, rows * patch, cols * patch)


def encode(vae: AutoencoderKL, config: BagelConfig, pixels: Tensor) -> Tensor:
    """pixels [M, 3, H, W] in [-1, 1] -> latent tokens [M, N, D] of the posterior mean, scaled and shifted."""
    mean = vae.encode(pixels).latent_dist.mean
    latent = config.vae_config.scale_factor * (mean - config.vae_config.shift_factor)
    return pack(latent, config.latent_patch_size)


def decode(vae: AutoencoderKL, config: BagelConfig, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """latent tokens [M, N, D] -> pixels [M, 3, H, W], about [-1, 1]."""
    latent = unpack(tokens, grid, config.latent_patch_size)
    latent = latent / config.vae_config.scale_factor + config.vae_config.shift_factor
    side = config.vae_config.downsample
    images = max(1, DECODED_PIXELS // (latent.shape[-1] * latent.shape[-2] * side**2))
    return torch.cat([vae.decode(part).sample for part in latent.split(images)])


def to_uint8(pixels: Tensor) -> Tensor:
    """pixels [M, 3, H, W] about [-1, 1] -> uint8 [M, H, W, 3], truncating as the reference does."""
    unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(images: Tensor) -> Tensor:
    """uint8 [M, H, W, 3] -> float pixels [M, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
