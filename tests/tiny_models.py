"""Tiny random language models and pipelines in the layouts of their libraries, made here; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

import common.composed  # noqa: F401 (mends torchvision before transformers imports it)

from transformers import (  # isort: skip
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

FAMILIES = ("sd3", "flux", "qwen_image")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</think>"]


def byte_tokenizer(**kwargs: Any) -> Qwen2Tokenizer:
    """One token per byte, and the chat's."""
    vocab = {token: i for i, token in enumerate([*BYTES, *SPECIAL])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], **kwargs)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:3]})
    tokenizer.add_tokens(["</think>"])
    return tokenizer


def make_reasoner(directory: Path, kind: str = "qwen2", seed: int = 0) -> Path:
    """qwen2: tied head and a chat template; llama: neither."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    tokenizer = byte_tokenizer(eos_token="<|im_end|>")
    if kind == "qwen2":
        tokenizer.chat_template = CHAT
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_pipeline(directory: Path, family: str, seed: int = 0) -> Path:
    """A pipeline of one family whose images are 32x32 pixels or any multiple of 8."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    pipeline = {"sd3": _sd3, "flux": _flux, "qwen_image": _qwen_image}[family](
        FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    for name, parameter in pipeline.transformer.named_parameters():
        # What libraries start at zero would hide what it is multiplied with.
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter, mean=float(name.endswith(("norm.weight", "norm_q.weight"))), std=0.1)
    pipeline.save_pretrained(directory, safe_serialization=True)
    return directory


def _clip(kind: type[CLIPTextModel], projected: int) -> tuple[Any, CLIPTokenizer]:
    # CLIP's vocabulary has every byte twice, the second ending a word.
    vocab = {t: i for i, t in enumerate([*BYTES, *(b + "</w>" for b in BYTES), "<|startoftext|>", "<|endoftext|>"])}
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20, projection_dim=projected, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return kind(config).eval(), CLIPTokenizer(vocab=vocab, merges=[], model_max_length=20)


def _t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)]
    config = T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval(), T5TokenizerFast(vocab=pieces, extra_ids=0)


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def _sd3(scheduler: Any) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, tokenizer = _clip(CLIPTextModelWithProjection, 16)
    clip2, tokenizer2 = _clip(CLIPTextModelWithProjection, 24)
    t5, tokenizer3 = _t5()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=40,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(transformer, scheduler, _vae(), clip, tokenizer, clip2, tokenizer2, t5, tokenizer3)


def _flux(scheduler: Any) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip, tokenizer = _clip(CLIPTextModel, 16)
    t5, tokenizer2 = _t5()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return FluxPipeline(scheduler, _vae(), clip, tokenizer, t5, tokenizer2, transformer)


def _qwen_image(scheduler: Any) -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    text = {
        "vocab_size": 272, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16,
              "fullatt_block_indexes": [0]}  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return QwenImagePipeline(scheduler, vae, encoder, byte_tokenizer(pad_token="<|endoftext|>"), transformer)
