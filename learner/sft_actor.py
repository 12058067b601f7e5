"""Supervised fine-tuning as Ray actors: one creates the policy if there is none, then all ranks train it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from common.actors import building
from common.bagel import checkpoint as store
from common.bagel.config import VAEConfig
from common.config import resolve_path
from common.rundir import RunDirectory
from common.sft_config import Create, SFTConfig
from common.shapes import prompts as shapes_prompts
from learner.create import create, train_tokenizer, train_vae
from learner.dataset import encode_pairs, parquet_pairs, shapes_pairs
from learner.engine import Engine, init_process_group
from learner.sft import train


def create_policy(config: SFTConfig, sizes: Create, out: str) -> str:
    """Tokenizer and autoencoder fitted to the shapes task, random transformer; uses all CPUs it sees."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    autoencoder = sizes.autoencoder
    pairs = shapes_pairs(autoencoder.images, config.seed + 1)
    prompts = [record["prompt"] for record in shapes_prompts.load(shapes_prompts.DATA / "train.jsonl")]
    tokenizer = train_tokenizer([*prompts, *(reasoning or "" for _, reasoning, _ in pairs)], sizes.vocab_size)
    geometry = VAEConfig(**autoencoder.model_dump(include={"z_channels", "ch", "ch_mult", "num_res_blocks"}))
    vae, fitted = train_vae(
        geometry,
        np.stack([image for *_, image in pairs]),
        steps=autoencoder.steps,
        batch=autoencoder.batch,
        lr=autoencoder.lr,
        kl=autoencoder.kl,
        seed=config.seed,
    )
    described = sizes.model_dump(include={"llm_config", "latent_patch_size", "max_latent_size", "timestep_shift"})
    create(described, tokenizer, vae, fitted, config.seed, Path(out))
    return out


class SFTRank:
    """One data-parallel rank."""

    @building
    def __init__(self, config: SFTConfig, start: str, rank: int, address: str, run: str) -> None:
        self.config, self.rank, self.run = config, rank, RunDirectory(run)
        init_process_group(rank, config.ranks, address, config.deadline_s)
        self.checkpoint = store.load(resolve_path(start), torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
        if config.data == "shapes":
            # Streams far apart, so that no rank's examples are another's or the autoencoder's.
            stream = 1000 * (config.seed + 1) + rank
            pairs = shapes_pairs(config.examples // config.ranks, stream, config.think_share, config.prompt_share)
        else:
            pairs = parquet_pairs(resolve_path(config.data), config.height, config.width)[rank :: config.ranks]
        self.examples = encode_pairs(pairs, self.checkpoint, config.system_prompt)

    def train(self) -> str:
        """Trains; rank 0 writes metrics and checkpoints. The directory of the last one."""
        c = self.config
        groups = {
            name: ([p for _, p in pairs], c.lr) for name, pairs in self.checkpoint.policy.parameter_groups().items()
        }
        engine = Engine(
            self.checkpoint.policy,
            groups,
            zero_stage=c.zero_stage,
            dtype=c.dtype,
            betas=c.betas,
            weight_decay=c.weight_decay,
            grad_clip=c.grad_clip,
        )

        def report(metrics: dict[str, float]) -> None:
            if self.rank == 0:
                self.run.append_metrics(metrics)

        def save(step: int, weights: dict[str, torch.Tensor]) -> None:
            if self.rank == 0:
                out = Path(c.out) if step == c.steps else Path(f"{c.out}-{step}")
                store.save(self.checkpoint, out, {k: v.clone() for k, v in weights.items()})

        train(engine, self.examples, c, c.seed * 1000 + self.rank, report, save)
        return c.out
