"""The directory a reasoner is started from, and the weights its model consists of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.rundir import replacing_directory

_PREFIX = "language_model."
_GENERATION_EXPERT = "_moe_gen"
# Read by BAGEL only, or, the token ids, given to the reasoner by its caller.
_DROPPED_KEYS = ("layer_module", "bos_token_id", "eos_token_id", "pad_token_id")


def understanding_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The understanding half of a BAGEL checkpoint, named for the reasoner: without the leading `language_model.`, the
    generation expert and everything outside the language model."""
    for name, tensor in weights:
        if name.startswith(_PREFIX) and _GENERATION_EXPERT not in name:
            yield name.removeprefix(_PREFIX), tensor


def reasoner_shapes(llm_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the decoder that `llm_config` describes; with `tie_word_embeddings` there is
    no `lm_head.weight`. KeyError if a size is missing; ValueError if `head_dim` is not
    `hidden_size / num_attention_heads`."""
    hidden, inner = llm_config["hidden_size"], llm_config["intermediate_size"]
    head = hidden // llm_config["num_attention_heads"]
    if llm_config.get("head_dim") not in (None, head):
        raise ValueError(f"head_dim {llm_config['head_dim']} is not hidden_size / num_attention_heads = {head}")
    kv = head * llm_config["num_key_value_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if llm_config.get("qk_norm", False):
        layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    embedding = (llm_config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding, "model.norm.weight": (hidden,)}
    if not llm_config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = embedding
    for index in range(llm_config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes weights on while checking that each name in shapes comes exactly once and in its shape. RuntimeError at an
    unknown or repeated name or a wrong shape, or at the end if a name did not come."""
    missing = dict(shapes)
    for name, tensor in weights:
        shape = missing.pop(name, None)
        if shape is None:
            raise RuntimeError(f"weight {name} was given twice" if name in shapes else f"no weight {name} in the model")
        if tuple(tensor.shape) != tuple(shape):
            raise RuntimeError(f"weight {name} has shape {tuple(tensor.shape)}, the model's has {tuple(shape)}")
        yield name, tensor
    if missing:
        raise RuntimeError(f"{len(missing)} weights were not given: {', '.join(sorted(missing)[:5])}")


def reasoner_config(llm_config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of the reasoner that BAGEL's `llm_config.json` describes."""
    config = {key: value for key, value in llm_config.items() if key not in _DROPPED_KEYS}
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config.setdefault("qk_norm", False)
    config.setdefault("tie_word_embeddings", False)
    if "rope_parameters" not in config:
        config.setdefault("rope_theta", 1e6)
    return config


def write_reasoner_dir(
    path: str | Path, llm_config: dict[str, Any], weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Writes `config.json` and `model.safetensors` as vLLM loads them, replacing `path` when they are complete.

    path: its parent is created; llm_config: BAGEL's `llm_config.json`, without `qk_norm` a plain Qwen2; weights: named
    as in `reasoner_shapes`, for a BAGEL checkpoint through `understanding_weights`.

    KeyError if a size is missing in llm_config; ValueError if vLLM's Qwen2 cannot express it; RuntimeError if weights
    are missing, unknown, repeated or of another shape.
    """
    path = Path(path)
    shapes = reasoner_shapes(llm_config)
    with replacing_directory(path) as aside:
        (aside / "config.json").write_text(json.dumps(reasoner_config(llm_config), indent=1))
        save_weights(checked_weights(weights, shapes), aside / "model.safetensors")


def save_weights(weights: Iterable[tuple[str, torch.Tensor]], path: str | Path) -> None:
    """Writes weights to one safetensors file, copying each: safetensors refuses tensors that share storage."""
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights}
    save_file(copies, path, metadata={"format": "pt"})


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads `config.json` of a reasoner directory. FileNotFoundError if there is none."""
    config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text())
    return config
