"""What a BAGEL checkpoint does with an image that it is given: answers about it, and edits it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import flow
from common.bagel import vae, vit
from common.bagel.cfg import Branches, guided_velocity
from common.bagel.checkpoint import Checkpoint
from common.bagel.config import BagelConfig
from common.bagel.interleaved import Latents, Part, Patches, read
from common.checkpoint_files import CheckpointError
from common.config import Cfg, TrainConfig
from common.system_prompts import system_prompt


@dataclass(frozen=True)
class Sides:
    """What an image is resized to, in pixels: its longest and shortest side, multiples of stride."""

    longest: int
    shortest: int
    stride: int


def sides(config: BagelConfig) -> tuple[Sides, Sides]:
    """Before the autoencoder and before the tower: as many tokens and patches as the position tables have, and the
    release's proportions, 1024 to 512 and 980 to 224. CheckpointError without a tower."""
    if config.vit_config is None:
        raise CheckpointError("this checkpoint does not understand images: it has no vit_config.json")
    latents, patches = config.max_latent_size, config.vit_max_num_patch_per_side
    stride, patch = config.pixels_per_token, config.vit_config.patch_size
    return (
        Sides(latents * stride, latents * stride // 2, stride),
        Sides(patches * patch, patches * patch * 224 // 980, patch),
    )


def look(checkpoint: Checkpoint, image: NDArray[np.uint8], sizes: tuple[Sides, Sides]) -> tuple[Latents, Patches]:
    """An image [H, W, 3] as both halves see it; the tower sees what was resized for the autoencoder."""
    config, (first, second) = checkpoint.config, sizes
    resized = vit.resized(image, first.longest, first.shortest, first.stride)
    pixels = vae.from_uint8(torch.from_numpy(resized)[None]).to(checkpoint.policy.device)
    tokens = vae.encode(checkpoint.vae, config, pixels)[0]
    seen = vit.fitted(resized, second.longest, second.shortest, second.stride)
    return Latents(tokens, config.grid(*resized.shape[:2])), Patches(*vit.patchify(seen, second.stride))


@torch.no_grad()
def answer(checkpoint: Checkpoint, image: NDArray[np.uint8], question: str, max_tokens: int) -> str:
    """The likeliest answer, token by token, to a question about an image [H, W, 3]."""
    _, patches = look(checkpoint, image, sides(checkpoint.config))
    return checkpoint.chat.decode(write(checkpoint, [patches, checkpoint.chat.wrap(question)], max_tokens))


@torch.no_grad()
def edit(
    checkpoint: Checkpoint, image: NDArray[np.uint8], instruction: str, config: TrainConfig, seed: int
) -> tuple[NDArray[np.uint8], str]:
    """An image [H, W, 3] changed as instructed, as large as the autoencoder saw it, and the reasoning before it, empty
    without sampling.think; in the time points and with the guidance of evaluation."""
    sampling, cfg, system = config.sampling, config.evaluation.cfg, system_prompt(config.model.system_prompt)
    seen = look(checkpoint, image, sides(checkpoint.config))
    written: list[int] = []
    if sampling.think:
        document = conversation(checkpoint, system, seen, instruction)
        written = write(checkpoint, document, sampling.max_tokens, sampling.temperature, seed)
    branches = editing_contexts(checkpoint, system, seen, instruction, written, cfg)
    grid = seen[0].grid
    noise = torch.randn(1, *seen[0].tokens.shape, generator=torch.Generator().manual_seed(seed))
    x = noise.to(checkpoint.policy.device)
    times = torch.tensor(flow.timesteps(config.evaluation.points, sampling.shift), device=x.device)
    for t, t_next in zip(times[:-1, None], times[1:, None], strict=True):
        v = guided_velocity(checkpoint.policy, x, t.float(), branches, grid, cfg)
        x = flow.mean_of(flow.euler_step(t, t_next), x, v)
    return checkpoint.decode(x, grid)[0].cpu().numpy(), checkpoint.chat.decode(written)


def conversation(checkpoint: Checkpoint, system: str, seen: tuple[Latents, Patches], instruction: str) -> list[Part]:
    """What precedes the answer to an instruction about an image; without instruction, nothing is asked."""
    wrap = checkpoint.chat.wrap
    return [*([wrap(system)] if system else []), *seen, *([wrap(instruction)] if instruction else [])]


def editing_contexts(
    checkpoint: Checkpoint, system: str, seen: tuple[Latents, Patches], instruction: str, written: list[int], cfg: Cfg
) -> Branches:
    """What the edited image attends to, and what it does where guidance leaves out the instruction, or the image; both
    leave out the reasoning that was written (its sampled ids)."""
    chat = checkpoint.chat
    whole = conversation(checkpoint, system, seen, instruction)
    if written:
        whole.append(chat.context_ids([chat.start], written))
    blind = chat.wrap(system) + chat.wrap(instruction)
    return Branches(
        read(checkpoint.policy, [whole])[1],
        read(checkpoint.policy, [conversation(checkpoint, system, seen, "")])[1],
        checkpoint.policy.prefill([blind]) if cfg.image_scale > 1 else None,
    )


def write(
    checkpoint: Checkpoint, document: list[Part], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """The ids of the chunk that follows a document, EOS included; at temperature 0 the likeliest ones."""
    decoder, chat = checkpoint.policy.language_model, checkpoint.chat
    generator = torch.Generator().manual_seed(seed)
    hidden, context, _ = read(checkpoint.policy, [[*document, [chat.start]]])
    ids: list[int] = []
    while True:
        ids.append(_drawn(decoder.lm_head(hidden[-1]), temperature, generator))
        if ids[-1] == chat.end or len(ids) == max_tokens:
            return ids
        hidden, context = decoder.model.extend(torch.tensor(ids[-1:], device=hidden.device), context)


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=generator))
