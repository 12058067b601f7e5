"""Sizes of a BAGEL checkpoint from config.json and llm_config.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.bagel.config import BagelConfig
from common.bagel.flops import draw_flops, read_flops
from common.bagel.policy import BagelPolicy
from common.bagel.vae import DECODED_PIXELS, vae_shapes
from common.policy import Policy
from common.sizes import ChainShape, Counts


@dataclass(frozen=True)
class BagelSizes:
    """See `common.sizes.Sizes`. Parameters are counted on the meta device, which allocates nothing.

    Activations are counted from the decoder's operations, as if all weights were trained (adapters keep less): what
    autograd keeps of one token in one layer is 4 hidden + 6 query + 1 key/value + 4 intermediate numbers, and every
    image keeps its own copy of the context's keys and values, repeated to the query heads.
    """

    config: BagelConfig
    counts: Counts
    reasoner: int
    autoencoder: int

    @classmethod
    def read(cls, directory: Path, choose: Callable[[Policy], None] = lambda policy: None) -> BagelSizes:
        """choose makes a policy's parameters trainable or not. CheckpointError naming file and field where the
        configuration cannot be used."""
        config = BagelConfig.read(directory)
        with torch.device("meta"):
            plain, trained = BagelPolicy(config, (0, 0)), BagelPolicy(config, (0, 0))
        choose(trained)
        return cls(
            config,
            Counts.of(plain, trained),
            sum(tensor.numel() for _, tensor in plain.reasoning_weights()),
            sum(math.prod(shape) for shape in vae_shapes(config.vae_config).values()),
        )

    def frozen_bytes(self, width: int) -> int:
        return 4 * self.autoencoder  # always fp32

    @property
    def denoiser(self) -> int:
        return self.counts.policy

    @property
    def host(self) -> int:
        return 0

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

    def decoding_bytes(self, images: int, image: int, width: int) -> int:
        """Input, norm and activation, in fp32, of the residual block that holds most, beside the images themselves."""
        vae = self.config.vae_config
        pixels = image * self.config.pixels_per_token**2
        entering = [vae.ch * multiple for multiple in (*vae.ch_mult[1:], vae.ch_mult[-1])]
        widest = max(channels / 4**level for level, channels in enumerate(entering))
        at_once = min(images, max(1, DECODED_PIXELS // pixels))
        return 4 * pixels * (int(3 * widest * at_once) + images * vae.out_ch)

    def training_bytes(self, chain: ChainShape, width: int, recompute: bool) -> int:
        llm = self.config.llm_config
        token = 4 * llm.hidden_size + 6 * self._q + self._kv + 4 * llm.intermediate_size
        images = chain.window * (chain.image + 2)
        layer = (chain.text + images) * token + chain.window * chain.text * 2 * self._q
        entering = (chain.text + images) * llm.hidden_size + (1 + chain.window) * chain.text * 2 * self._kv
        head = chain.scored * (llm.hidden_size * width + 2 * llm.vocab_size * 4)
        kept = llm.num_hidden_layers * (entering if recompute else layer)
        # The backward of a layer holds the gradients of what it kept and, when recomputing, that itself.
        return width * (kept + (2 if recompute else 1) * layer) + head
