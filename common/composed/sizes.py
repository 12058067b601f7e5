"""Sizes of a composed policy from the JSON files of its two directories: counted and rehearsed on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from common.composed.checkpoint import frozen_skeletons, read_index, skeleton
from common.composed.family import Conditioning, Family
from common.composed.policy import ComposedPolicy
from common.composed.source import Source
from common.policy import Policy, score_logits
from common.rehearsal import Forward, Kept, kept, rehearse
from common.sizes import ChainShape, Counts, squarest


@dataclass(frozen=True, eq=False)
class ComposedSizes:
    """See `common.sizes.Sizes`. The transformer is given as many text tokens as its encoders make of the longest
    reasoning."""

    family: Family
    plain: ComposedPolicy
    trained: ComposedPolicy
    counts: Counts
    vae: nn.Module
    frozen: int

    @classmethod
    def read(cls, source: Source, choose: Callable[[Policy], None]) -> ComposedSizes:
        """choose makes a policy's parameters trainable or not. CheckpointError where a file cannot be used."""
        plain, trained = skeleton(source), skeleton(source)
        choose(trained)
        others = frozen_skeletons(source)
        frozen = sum(p.numel() for module in others.values() for p in module.parameters())
        return cls(read_index(source)[0], plain, trained, Counts.of(plain, trained), others["vae"], frozen)

    def frozen_bytes(self, width: int) -> int:
        return self.frozen * width

    @property
    def reasoner(self) -> int:
        return sum(p.numel() for p in self.plain.reasoner.parameters())

    @property
    def denoiser(self) -> int:
        return sum(p.numel() for p in self.plain.transformer.parameters())

    @property
    def host(self) -> int:
        return self.reasoner

    @property
    def twice(self) -> int:
        return 0

    @property
    def kv_numbers(self) -> int:
        config: Any = self.plain.reasoner.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * head)

    def image_tokens(self, height: int, width: int) -> int:
        rows, columns = self.family.grid(height, width)
        return rows * columns

    @lru_cache  # noqa: B019 (one instance in a process that plans)
    def read_flops(self, tokens: int, scored: int) -> int:
        found = rehearse([self.plain], lambda: _score(self.plain, tokens, scored))
        return found.matrix_flops + found.attention_flops // 2  # causal

    def draw_flops(self, image: int, context: int) -> int:
        found = self._draw(image, context, 2)
        return found.matrix_flops + found.attention_flops

    def drawing_bytes(self, image: int, context: int, width: int) -> int:
        return self._draw(image, context, width).most_bytes

    @lru_cache  # noqa: B019
    def decoding_bytes(self, images: int, image: int, width: int) -> int:
        """One after the other."""
        nn.Module.to(self.vae, _dtype(width))  # diffusers' own warns of what matters to loaded weights
        tokens = torch.empty(1, image, self.family.token_dim, device="meta", dtype=_dtype(width))
        pipeline = SimpleNamespace(vae=self.vae)
        return rehearse([self.vae], lambda: self.family.decode(pipeline, tokens, self._grid(image))).most_bytes

    def training_bytes(self, chain: ChainShape, width: int, recompute: bool) -> int:
        return self.kept(chain, width).most(recompute)

    @lru_cache  # noqa: B019
    def kept(self, chain: ChainShape, width: int) -> Kept:
        """Of one chain, whose reasoning, or prompt without one, is all final prompt."""
        words = chain.scored or chain.text
        policy = self.trained.to(_dtype(width))
        layers = [m for m in policy.reasoner.modules() if isinstance(m, GradientCheckpointingLayer)]
        blocks = [m for c in policy.transformer.children() if isinstance(c, nn.ModuleList) for m in c]
        read = kept(policy.reasoner, layers, lambda: _score(policy, chain.text, chain.scored))
        drawn = kept(
            policy.transformer, blocks, lambda: self._velocity(policy, chain.window, chain.image, words, width)
        )
        return read + drawn

    @lru_cache  # noqa: B019
    def _draw(self, image: int, context: int, width: int) -> Forward:
        policy = self.plain.to(_dtype(width))
        return rehearse([policy], lambda: self._velocity(policy, 1, image, context, width))

    def _velocity(self, policy: ComposedPolicy, images: int, image: int, context: int, width: int) -> Tensor:
        x_t = torch.empty(images, image, self.family.token_dim, device="meta")
        blank = self.family.blank(images, context)
        embeds = blank.embeds.to(_dtype(width))
        pooled = None if blank.pooled is None else blank.pooled.to(_dtype(width))
        t = torch.empty(images, device="meta")
        return policy.velocity(x_t, t, Conditioning(embeds, pooled, blank.mask), self._grid(image))

    def _grid(self, image: int) -> tuple[int, int]:
        return squarest(image, self.family.grid_step)


def _score(policy: ComposedPolicy, tokens: int, scored: int) -> tuple[Tensor, Tensor]:
    """What `ComposedPolicy.score` does for one text. A mask is given, as none would be looked for in the ids."""
    ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
    mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device="meta").expand(1, 1, tokens, tokens)
    logits = policy.reasoner(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=scored + 1).logits
    place = torch.arange(scored, device="meta")
    return score_logits(logits[torch.zeros_like(place), place], place)


def _dtype(width: int) -> torch.dtype:
    return torch.float32 if width == 4 else torch.bfloat16
