"""FLUX.1: CLIP's pooled embedding and T5; the guidance-distilled model is told its guidance and has one branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.composed.family import Conditioning, Family, unpack

T5_TOKENS = 512


class Flux(Family):
    """FluxPipeline."""

    def blank(self, images: int, words: int) -> Conditioning:
        """T5's window, which the pipeline fills up."""
        embeds = torch.empty(images, T5_TOKENS, self.transformer["joint_attention_dim"], device="meta")
        return Conditioning(embeds, torch.empty(images, self.transformer["pooled_projection_dim"], device="meta"))

    @torch.no_grad()
    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(prompts)
        return Conditioning(embeds, pooled)

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, grid: tuple[int, int]
    ) -> Tensor:
        row, column = torch.meshgrid(*(torch.arange(n, device=x_t.device) for n in grid), indexing="ij")
        place = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
        (velocity,) = transformer(
            hidden_states=x_t,
            timestep=t,
            guidance=torch.full_like(t, self.guidance) if self.transformer["guidance_embeds"] else None,
            pooled_projections=conditioning.pooled.to(x_t.dtype),  # type: ignore[union-attr]
            encoder_hidden_states=conditioning.embeds.to(x_t.dtype),
            txt_ids=place.new_zeros(conditioning.embeds.shape[1], 3).to(x_t.dtype),
            img_ids=place.to(x_t.dtype),
            return_dict=False,
        )
        return velocity

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return unpack(tokens, grid) / self.vae["scaling_factor"] + self.vae["shift_factor"]
