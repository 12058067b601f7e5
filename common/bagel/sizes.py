"""Sizes of a BAGEL checkpoint from config.json and llm_config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.bagel.config import BagelConfig
from common.bagel.flops import draw_flops, read_flops
from common.bagel.policy import BagelPolicy
from common.bagel.vae import vae_shapes
from common.sizes import ChainShape


@dataclass(frozen=True)
class BagelSizes:
    """See `common.sizes.Sizes`. Parameters are counted on the meta device, which allocates nothing.

    Activations are counted from the decoder's operations: what autograd keeps of one token in one layer is
    6 hidden + 7 query + 2 key/value + 4 intermediate numbers, and every image keeps its own copy of the context's keys
    and values, repeated to the query heads.
    """

    config: BagelConfig
    trainable: dict[str, int]
    policy: int
    frozen: int

    @classmethod
    def read(cls, directory: Path) -> BagelSizes:
        """CheckpointError naming file and field where the configuration cannot be used."""
        config = BagelConfig.read(directory)
        with torch.device("meta"):
            policy = BagelPolicy(config, (0, 0))
        trainable = {role: sum(p.numel() for _, p in pairs) for role, pairs in policy.parameter_groups().items()}
        return cls(
            config,
            trainable,
            sum(p.numel() for p in policy.parameters()),
            sum(math.prod(shape) for shape in vae_shapes(config.vae_config).values()),
        )

    @property
    def reasoner(self) -> int:
        return self.trainable["reasoning"]

    @property
    def denoiser(self) -> int:
        return self.policy

    @property
    def twice(self) -> int:
        return self.reasoner  # the image attends to what the reasoning expert makes of the text

    @property
    def kv_numbers(self) -> int:
        return 2 * self.config.llm_config.num_hidden_layers * self._kv

    @property
    def _q(self) -> int:
        return self.config.llm_config.num_attention_heads * self.config.llm_config.head_dim

    @property
    def _kv(self) -> int:
        return self.config.llm_config.num_key_value_heads * self.config.llm_config.head_dim

    def image_tokens(self, height: int, width: int) -> int:
        rows, cols = self.config.grid(height, width)
        return rows * cols

    def read_flops(self, tokens: int, scored: int) -> int:
        return read_flops(self.config, tokens, scored)

    def draw_flops(self, image: int, context: int) -> int:
        return draw_flops(self.config, image, context)

    def drawing_bytes(self, image: int, context: int, width: int) -> int:
        llm = self.config.llm_config
        layer = image * (3 * llm.hidden_size + 3 * llm.intermediate_size) + 4 * (context + image) * self._q
        return width * (context * self.kv_numbers + layer)

    def training_bytes(self, chain: ChainShape, width: int, recompute: bool) -> int:
        llm = self.config.llm_config
        token = 6 * llm.hidden_size + 7 * self._q + 2 * self._kv + 4 * llm.intermediate_size
        images = chain.window * (chain.image + 2)
        layer = (chain.text + images) * token + chain.window * chain.text * 2 * self._q
        entering = (chain.text + images) * llm.hidden_size + (1 + chain.window) * chain.text * 2 * self._kv
        head = chain.scored * (llm.hidden_size * width + 2 * llm.vocab_size * 4)
        kept = llm.num_hidden_layers * (entering if recompute else layer)
        # The backward of a layer holds the gradients of what it kept and, when recomputing, that itself.
        return width * (kept + (2 if recompute else 1) * layer) + head
