"""Stable Diffusion 3 and 3.5: two CLIPs and, if present, T5; the transformer takes latents as an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.composed.family import Conditioning, Family

CLIP_TOKENS, T5_TOKENS = 77, 256


class SD3(Family):
    """StableDiffusion3Pipeline. A token is one latent pixel; the transformer cuts its own patches."""

    patch = 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super().grid(height, width)
        cut, most = self.transformer["patch_size"], self.transformer["pos_embed_max_size"]
        if rows % cut or columns % cut or max(rows, columns) > cut * most:
            raise ValueError(
                f"image size {height}x{width}: this pipeline needs multiples of {cut * self.vae_scale} pixels, at most "
                f"{cut * most * self.vae_scale} along a side"
            )
        return rows, columns

    @property
    def grid_step(self) -> int:
        return int(self.transformer["patch_size"])

    def blank(self, images: int, words: int) -> Conditioning:
        """CLIP's window, and T5's, which the pipeline fills up."""
        embeds = torch.empty(images, CLIP_TOKENS + T5_TOKENS, self.transformer["joint_attention_dim"], device="meta")
        return Conditioning(embeds, torch.empty(images, self.transformer["pooled_projection_dim"], device="meta"))

    @torch.no_grad()
    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return Conditioning(embeds, pooled)

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, grid: tuple[int, int]
    ) -> Tensor:
        (image,) = transformer(
            hidden_states=self._image(x_t, grid),
            timestep=1000 * t,
            encoder_hidden_states=conditioning.embeds.to(x_t.dtype),
            pooled_projections=conditioning.pooled.to(x_t.dtype),  # type: ignore[union-attr]
            return_dict=False,
        )
        return image.flatten(2).transpose(1, 2)

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self._image(tokens, grid) / self.vae["scaling_factor"] + self.vae["shift_factor"]

    @staticmethod
    def _image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, grid)
