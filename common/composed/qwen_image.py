"""Qwen-Image: hidden states of Qwen2.5-VL, of as many tokens as the prompt has, and a VAE made for video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.composed.family import Conditioning, Family, unpack


class QwenImage(Family):
    """QwenImagePipeline."""

    @property
    def vae_scale(self) -> int:
        return int(2 ** len(self.vae["temperal_downsample"]))

    def blank(self, images: int, words: int) -> Conditioning:
        embeds = torch.empty(images, words, self.transformer["joint_attention_dim"], device="meta")
        return Conditioning(embeds, mask=torch.empty(images, words, dtype=torch.bool, device="meta"))

    @torch.no_grad()
    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, mask = pipeline.encode_prompt(prompts)
        # None means that all are real. A mask is always given, so that the attention takes the same kernel.
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        return Conditioning(embeds, mask=mask.bool())

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, grid: tuple[int, int]
    ) -> Tensor:
        (velocity,) = transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=conditioning.embeds.to(x_t.dtype),
            encoder_hidden_states_mask=conditioning.mask,
            img_shapes=[[(1, *grid)]] * len(x_t),
            return_dict=False,
        )
        return velocity

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        mean, std = (tokens.new_tensor(self.vae[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        return (unpack(tokens, grid) * std + mean)[:, :, None]

    def decode(self, pipeline: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().decode(pipeline, tokens, grid)[:, :, 0]
