"""A policy to and from a directory in BAGEL's released layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.bagel import vae as vae_ops
from common.bagel.cfg import Branches, guided_velocity
from common.bagel.config import BagelConfig, CheckpointError, read_json
from common.bagel.decoder import Context
from common.bagel.policy import BagelPolicy, PackedBatch, pack_batch
from common.bagel.text import ChatTokenizer
from common.bagel.vae import build_vae, from_diffusers, to_diffusers
from common.config import Cfg
from common.policy import Guidance, OpenPolicy

WEIGHTS, AUTOENCODER = "ema.safetensors", "ae.safetensors"
# Image understanding takes no part in prompt -> reasoning -> image.
UNUSED = ("vit_model.", "connector.", "vit_pos_embed.")


@dataclass(frozen=True)
class Checkpoint(OpenPolicy):
    """Everything a directory holds: the policy, the frozen autoencoder, the tokenizer, and where it came from."""

    policy: BagelPolicy
    vae: AutoencoderKL
    chat: ChatTokenizer
    config: BagelConfig
    directory: Path

    @property
    def token_dim(self) -> int:
        return self.config.token_dim

    @property
    def reasoner(self) -> dict[str, Any]:
        return read_json(self.directory / "llm_config.json") | {"vocab_size": self.config.llm_config.vocab_size}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.config.grid(height, width)

    def context(self, texts: list[list[int]]) -> Context:
        return self.policy.prefill(texts)

    def velocities(
        self, texts: list[list[int]], grid: tuple[int, int], guidance: Guidance | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        if guidance is None:
            return super().velocities(texts, grid)
        cfg = guidance.cfg
        branches = Branches.prefill(self.policy, texts, guidance.without_prompt, guidance.without_reasoning, cfg)
        return lambda x_t, t: guided_velocity(self.policy, x_t, t, branches, grid, cfg)

    def guidance(self, prompts: list[str], system: str, cfg: Cfg) -> Guidance:
        ids = [self.chat.cfg_ids(prompt, system) for prompt in prompts]
        return Guidance(cfg, [without for without, _ in ids], [without for _, without in ids])

    def pack(
        self,
        texts: Sequence[tuple[list[int], list[int]]],
        x_t: Tensor,
        t: Tensor,
        owner: Tensor,
        grid: tuple[int, int],
        guidance: Guidance | None = None,
    ) -> PackedBatch:
        whole = [self.chat.context_ids(prompt, response) for prompt, response in texts]
        scored = [(len(prompt), len(prompt) + len(response)) for prompt, response in texts]
        if guidance is None:
            return pack_batch(whole, scored, x_t, t, owner, grid)
        kept = [guidance.without_prompt, *([guidance.without_reasoning] if guidance.cfg.image_scale > 1 else [])]
        # Many chains leave the same text, which is read once.
        row = {tuple(text): 0 for branch in kept for text in branch}
        row = {text: len(whole) + number for number, text in enumerate(row)}
        branches = tuple(
            torch.tensor([row[tuple(text)] for text in branch], device=x_t.device)[owner] for branch in kept
        )
        packed = pack_batch([*whole, *map(list, row)], [*scored, *[(0, 0)] * len(row)], x_t, t, owner, grid)
        return replace(packed, branches=branches, cfg=guidance.cfg)

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return vae_ops.to_uint8(self.pixels(latents, grid))

    def pixels(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return vae_ops.decode(self.vae, self.config, latents, grid)

    def save(self, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
        save(self, directory, weights)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped. CheckpointError if it is missing or truncated."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; a checkpoint in BAGEL's layout has it")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. CheckpointError if missing or truncated."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """CheckpointError naming the first missing, extra or misshapen tensor."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise CheckpointError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    if extra:
        raise CheckpointError(f"{path}: tensor {extra[0]} is not part of the configured model ({len(extra)} extra)")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {tuple(found[name].shape)}, the config says {tuple(tensor.shape)}"
            )


def check(directory: Path) -> BagelConfig:
    """Cheap look at a checkpoint before anything starts: files, sizes, tokenizer; reads headers, not tensors."""
    if not directory.is_dir():
        raise CheckpointError(f"model: {directory} is not a directory; give the path of a checkpoint")
    config = BagelConfig.read(directory)
    ChatTokenizer.read(directory, config.llm_config.vocab_size)
    for name in (WEIGHTS, AUTOENCODER):
        with opened(directory / name):
            pass  # opening reads the header
    return config


def load(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Checkpoint:
    """Loads a checkpoint. Raises CheckpointError; nothing is returned half loaded."""
    config = BagelConfig.read(directory)
    chat = ChatTokenizer.read(directory, config.llm_config.vocab_size)
    with torch.device("meta"):
        policy = BagelPolicy(config, (chat.vision_start, chat.vision_end))
    found = {k: v for k, v in read_tensors(directory / WEIGHTS).items() if not k.startswith(UNUSED)}
    wanted = policy.state_dict()
    embedding = found.get("language_model.model.embed_tokens.weight")
    if config.llm_config.tie_word_embeddings and embedding is not None:
        found.setdefault("language_model.lm_head.weight", embedding)
    check_tensors(directory / WEIGHTS, found, wanted)
    policy.load_state_dict({k: v.to(device, dtype, copy=True) for k, v in found.items()}, assign=True)
    policy.latent_pos_embed.pos_embed.requires_grad_(False)
    if config.llm_config.tie_word_embeddings:
        # Assigning tensors by name has made two parameters of one.
        policy.language_model.lm_head.weight = policy.language_model.model.embed_tokens.weight
    vae = build_vae(config.vae_config)
    levels = len(config.vae_config.ch_mult)
    weights = read_tensors(directory / AUTOENCODER)
    check_tensors(directory / AUTOENCODER, weights, from_diffusers(vae.state_dict(), levels))
    vae.load_state_dict(to_diffusers(weights, levels))
    vae.requires_grad_(False).eval().to(device)
    return Checkpoint(policy, vae, chat, config, directory)


def save(checkpoint: Checkpoint, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Writes the layout to a new directory: aside first, then renamed. weights replaces the policy's own."""
    aside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = weights or checkpoint.policy.state_dict()
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside / WEIGHTS)
    levels = len(checkpoint.config.vae_config.ch_mult)
    save_file(from_diffusers(checkpoint.vae.state_dict(), levels), aside / AUTOENCODER)
    config = _release_config(checkpoint.config)
    (aside / "config.json").write_text(json.dumps(config, indent=2))
    (aside / "llm_config.json").write_text(json.dumps(config["llm_config"], indent=2))
    checkpoint.chat.tokenizer.save(str(aside / "tokenizer.json"))
    _copy_extras(checkpoint.directory, aside)
    for file in aside.iterdir():
        file.chmod(0o644)
    if directory.exists():
        shutil.rmtree(directory)
    aside.rename(directory)


def _release_config(config: BagelConfig) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    llm = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", **data["llm_config"]}
    return {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel", **data, "llm_config": llm}


def _copy_extras(source: Path, target: Path) -> None:
    """Files beside the weights that are not rewritten (tokenizer settings, model card)."""
    if source.is_dir():
        for file in source.iterdir():
            if file.is_file() and file.suffix in {".json", ".txt", ".md"} and not (target / file.name).exists():
                shutil.copy(file, target / file.name)
