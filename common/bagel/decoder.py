"""The mixture-of-transformers decoder: two experts per layer, one attention.

Text (and the markers around an image) goes through the understanding expert, latent tokens through the
generation expert (`*_moe_gen`); inside a layer both meet in one softmax. Noised images are invisible to text, so a
forward is two calls: `read` runs the text once and keeps keys and values, `draw` lets any number of images attend
to them. Rollout and learner use the same two calls, which keeps their numbers equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.bagel.config import LLMConfig
from common.bagel.elementwise import RMSNorm, Rope

UND, GEN = "", "_moe_gen"


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Projections of both experts; q and k are normalised per head before the rotary embedding."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        for expert in (UND, GEN):
            q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
            self.add_module("q_proj" + expert, nn.Linear(config.hidden_size, q))
            self.add_module("k_proj" + expert, nn.Linear(config.hidden_size, kv))
            self.add_module("v_proj" + expert, nn.Linear(config.hidden_size, kv))
            self.add_module("o_proj" + expert, nn.Linear(q, config.hidden_size, bias=False))
            for name in ("q_norm", "k_norm"):
                norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                self.add_module(name + expert, norm)

    def project(self, x: Tensor, rope: Rope, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> q [..., heads, D], k and v [..., kv_heads, D], q and k rotated."""
        q = getattr(self, "q_proj" + expert)(x).unflatten(-1, (self.heads, self.head_dim))
        k = getattr(self, "k_proj" + expert)(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = getattr(self, "v_proj" + expert)(x).unflatten(-1, (self.kv_heads, self.head_dim))
        q, k = getattr(self, "q_norm" + expert)(q), getattr(self, "k_norm" + expert)(k)
        return rope(q), rope(k), v

    def out(self, x: Tensor, expert: str) -> Tensor:
        """[..., heads, D] -> [..., H]."""
        return getattr(self, "o_proj" + expert)(x.flatten(-2))


class Layer(nn.Module):
    """One decoder layer with both experts."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for expert in (UND, GEN):
            self.add_module("mlp" + expert, MLP(config))
            self.add_module("input_layernorm" + expert, RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module("post_attention_layernorm" + expert, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def read(self, x: Tensor, rope: Rope, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        """Packed text x [T, H] -> the same after this layer, and its keys and values [B, L, kv_heads, D]."""
        # Padding is on the right, so the causal mask alone hides it from every real query.
        q, k, v = (packing.pad(part) for part in self.project(x, rope, UND))
        return self.finish(x, packing.flatten(attend(q, k, v, causal=True)), UND), k, v

    def draw(
        self, gen: Tensor, und: Tensor, key: Tensor, value: Tensor, rope: Rope, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latents gen [M, N, H] and markers und [M, 2, H] -> the same after this layer, attending to each other and
        to key and value [M, L, kv_heads, D]."""
        qg, kg, vg = self.project(gen, rope, GEN)
        qu, ku, vu = self.project(und, rope, UND)
        out = attend(torch.cat([qg, qu], 1), torch.cat([key, kg, ku], 1), torch.cat([value, vg, vu], 1), mask=mask)
        drawn, marked = out.split((gen.shape[1], und.shape[1]), 1)
        return self.finish(gen, drawn, GEN), self.finish(und, marked, UND)

    def project(self, x: Tensor, rope: Rope, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(getattr(self, "input_layernorm" + expert)(x), rope, expert)

    def finish(self, x: Tensor, attended: Tensor, expert: str) -> Tensor:
        x = x + self.self_attn.out(attended, expert)
        return x + getattr(self, "mlp" + expert)(getattr(self, "post_attention_layernorm" + expert)(x))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """q [B, Q, heads, D], k and v [B, K, kv_heads, D] -> [B, Q, heads, D]. mask is True where a key may be seen."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    dtype, repeat, cpu = q.dtype, q.shape[1] // k.shape[1], q.device.type == "cpu"
    if cpu and dtype == torch.bfloat16:
        # The CPU kernel's bf16 backward is several times slower than its fp32 one.
        q, k, v = q.float(), k.float(), v.float()
    if repeat > 1 and not cpu:
        # On GPUs not every kernel that takes a mask shares keys among heads; the CPU's does, in half the time.
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=cpu)
    return out.transpose(1, 2).to(dtype)


@dataclass(frozen=True)
class Packing:
    """How B token lists lie flat: list b occupies rows `index[b, :lengths[b]]` of the flat tensor.

    index [B, L] int64 (padding points at row 0), lengths [B], present [B, L] bool, where [T] = the padded slots in
    flat order, positions [T] of each row in its list.
    """

    index: Tensor
    lengths: Tensor
    present: Tensor
    where: Tensor
    positions: Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Packing:
        n = torch.tensor(lengths, device=device)
        column = torch.arange(max(lengths), device=device)
        present = column < n[:, None]
        start = n.cumsum(0) - n
        index = torch.where(present, start[:, None] + column, 0)
        where = present.flatten().nonzero()[:, 0]
        return cls(index, n, present, where, column.expand_as(index).flatten()[where])

    # index_select, since the backward of plain indexing takes several times as long on a CPU.

    def pad(self, flat: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...]."""
        return flat.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def flatten(self, padded: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...], without the padding."""
        return padded.flatten(0, 1).index_select(0, self.where)


@dataclass(frozen=True)
class Context:
    """Text that images may attend to: per layer keys and values [B, L, kv_heads, D], which slots are real, and the
    rope position that follows each text [B]."""

    keys: list[Tensor]
    values: list[Tensor]
    present: Tensor
    position: Tensor

    def detach(self) -> Context:
        """The same context without gradient: the image loss then leaves the reasoning expert alone."""
        return Context([k.detach() for k in self.keys], [v.detach() for v in self.values], self.present, self.position)

    def take(self, index: Tensor) -> Context:
        """Context rows by index [M] (rows may repeat)."""
        return Context(
            [k.index_select(0, index) for k in self.keys],
            [v.index_select(0, index) for v in self.values],
            self.present[index],
            self.position[index],
        )


class Decoder(nn.Module):
    """The decoder under BAGEL's names (`language_model.model.*`).

    recompute: keep only what enters each layer, and compute the rest of its activations again in the backward.
    """

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config, self.recompute = config, False
        # Without numbers: to draw them on the meta device torch imports its compiler, seconds of every start.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def read(self, ids: Tensor, packing: Packing) -> tuple[Tensor, Context]:
        """Causal pass over packed texts. ids [T] -> hidden [T, H] (after the final norm) and the context."""
        x = self.embed_tokens(ids)
        rope = Rope.at(packing.positions, self.config, x.dtype)
        keys, values = [], []
        for layer in cast(Iterable[Layer], self.layers):
            x, k, v = self._run(layer.read, nullcontext, x, rope, packing)
            keys.append(k)
            values.append(v)
        return self.norm(x), Context(keys, values, packing.present, packing.lengths)

    def read_interleaved(
        self, x: Tensor, generation: Tensor, positions: Tensor, packing: Packing, mask: Tensor, after: Tensor
    ) -> tuple[Tensor, Context]:
        """Pass over packed documents that hold images, too. x [T, H] embedded tokens, generation [T] bool where the
        generation expert acts, positions [T], mask [B, L, L] True where a key may be seen, after [B] the rope position
        behind each document -> hidden [T, H] after each expert's final norm, and the context."""
        rows = (~generation).nonzero()[:, 0], generation.nonzero()[:, 0]
        flat = torch.cat(rows).argsort()
        streams = [x[row] for row in rows]
        ropes = [Rope.at(positions[row], self.config, x.dtype) for row in rows]
        keys, values = [], []
        for layer in cast(Iterable[Layer], self.layers):
            both = [layer.project(*part) for part in zip(streams, ropes, (UND, GEN), strict=True)]
            q, k, v = (packing.pad(torch.cat(parts)[flat]) for parts in zip(*both, strict=True))
            out = packing.flatten(attend(q, k, v, mask=mask[:, None]))
            streams = [
                layer.finish(part, out[row], expert)
                for part, row, expert in zip(streams, rows, (UND, GEN), strict=True)
            ]
            keys.append(k)
            values.append(v)
        hidden = torch.cat([self.norm(streams[0]), self.norm_moe_gen(streams[1])])[flat]
        return hidden, Context(keys, values, packing.present, after)

    def extend(self, ids: Tensor, context: Context) -> tuple[Tensor, Context]:
        """One more text token ids [B] behind each context -> hidden [B, H] after the final norm, and the contexts with
        it."""
        x = self.embed_tokens(ids)[:, None]
        rope = Rope.at(context.position[:, None], self.config, x.dtype)
        present = torch.cat([context.present, context.present.new_ones(len(ids), 1)], 1)
        keys, values = [], []
        for layer, key, value in zip(cast(Iterable[Layer], self.layers), context.keys, context.values, strict=True):
            q, k, v = layer.project(x, rope, UND)
            keys.append(torch.cat([key, k], 1))
            values.append(torch.cat([value, v], 1))
            x = layer.finish(x, attend(q, keys[-1], values[-1], mask=present[:, None, None, :]), UND)
        return self.norm(x)[:, 0], Context(keys, values, present, context.position + 1)

    def draw(
        self,
        latents: Tensor,
        markers: Tensor,
        context: Context,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """One pass over M images, each full inside and attending to its context.

        latents [M, N, H] embedded latent tokens, markers [M, 2, H] embedded vision_start and vision_end, context with
        M rows -> hidden [M, N, H] after the generation expert's final norm. within: what the call runs in, which a
        recomputation must enter, too.
        """
        gen, und = latents, markers
        # Every token of an image shares one rope position.
        rope = Rope.at(context.position[:, None], self.config, gen.dtype)
        own = context.present.new_ones(gen.shape[0], gen.shape[1] + 2)
        mask = torch.cat([context.present, own], 1)[:, None, None, :]
        for layer, key, value in zip(cast(Iterable[Layer], self.layers), context.keys, context.values, strict=True):
            gen, und = self._run(layer.draw, within, gen, und, key, value, rope, mask)
        return self.norm_moe_gen(gen)

    def _run(self, layer: Callable[..., Any], within: Callable[[], AbstractContextManager[None]], *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            contexts = lambda: (nullcontext(), within())  # noqa: E731
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
        return layer(*inputs)
