"""A small policy from nothing: tokenizer, autoencoder and random transformer in BAGEL's layout.

Supervised fine-tuning then teaches it to plan and to draw; bigger checkpoints skip this and start from their files.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.bagel import checkpoint as store
from common.bagel.config import BagelConfig, VAEConfig
from common.bagel.policy import BagelPolicy
from common.bagel.text import SPECIAL_TOKENS, ChatTokenizer
from common.bagel.vae import build_vae, from_diffusers, from_uint8

log = logging.getLogger(__name__)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with BAGEL's chat tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_vae(
    config: VAEConfig, images: np.ndarray, *, steps: int, batch: int, lr: float, kl: float, seed: int
) -> tuple[AutoencoderKL, VAEConfig]:
    """Fits the autoencoder to uint8 images [M, H, W, 3]; returns it with the scale and shift that give its latents
    zero mean and unit variance."""
    torch.manual_seed(seed)
    vae = build_vae(config)
    data = torch.from_numpy(images)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        pixels = from_uint8(data[torch.randint(len(data), (batch,))])
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        error = F.mse_loss(rebuilt, pixels) + 0.2 * F.l1_loss(rebuilt, pixels)
        loss = error + kl * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("autoencoder step %d/%d: error %.5f", step + 1, steps, error.item())
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        mean = torch.cat([vae.encode(from_uint8(chunk)).latent_dist.mean for chunk in data[:2048].split(64)])
    fitted = config.model_copy(update={"scale_factor": float(1 / mean.std()), "shift_factor": float(mean.mean())})
    return vae, fitted


def create(
    sizes: dict[str, Any], tokenizer: Tokenizer, vae: AutoencoderKL, fitted: VAEConfig, seed: int, out: Path
) -> None:
    """Writes a checkpoint with random transformer weights. sizes: config.json's content less vae_config."""
    sizes = {**sizes, "vae_config": fitted.model_dump()}
    sizes["llm_config"] = {**sizes["llm_config"], "vocab_size": tokenizer.get_vocab_size()}
    config = BagelConfig.model_validate(sizes)
    specials = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS[1:]}
    chat = ChatTokenizer(tokenizer, *(number for number in specials.values() if number is not None))
    policy = BagelPolicy(config, (chat.vision_start, chat.vision_end))
    policy.init_weights(seed)
    numbers = from_diffusers(vae.state_dict(), len(fitted.ch_mult))
    store.save(store.Checkpoint(policy, numbers, chat, config), out)
