"""Floating-point operations of the model's two passes, counted from shapes (a multiply and an add are two)."""

from __future__ import annotations

from common.bagel.config import BagelConfig, LLMConfig


def expert_flops(llm: LLMConfig) -> int:
    """Matrix operations of one expert for one token, all layers, attention scores apart."""
    q, kv = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    attention = llm.hidden_size * (2 * q + 2 * kv)
    return 2 * llm.num_hidden_layers * (attention + 3 * llm.hidden_size * llm.intermediate_size)


def attention_flops(llm: LLMConfig, queries: int, keys: int) -> int:
    """Scores and weighted values of `queries` tokens over `keys` tokens, all layers."""
    return 4 * llm.num_hidden_layers * llm.num_attention_heads * llm.head_dim * queries * keys


def read_flops(config: BagelConfig, tokens: int, scored: int = 0) -> int:
    """Forward over one text; `scored` positions go through the head. Causal attention counts half."""
    llm = config.llm_config
    head = 2 * llm.hidden_size * llm.vocab_size * scored
    return expert_flops(llm) * tokens + attention_flops(llm, tokens, tokens) // 2 + head


def draw_flops(config: BagelConfig, image_tokens: int, context: int) -> int:
    """One velocity of one image whose text has `context` tokens (two marker tokens included)."""
    llm = config.llm_config
    tokens = image_tokens + 2
    ends = 4 * config.token_dim * llm.hidden_size * image_tokens
    return expert_flops(llm) * tokens + attention_flops(llm, tokens, context + tokens) + ends
