"""A composed policy from and to its two directories: the reasoner in transformers' layout, the pipeline in diffusers'.

Weights come from safetensors only, classes from transformers and diffusers only, and every tensor has to be there.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.checkpoint_files import PICKLES, CheckpointError, check_finite, opened, read_json
from common.composed.chat import TemplateChat
from common.composed.family import Conditioning, Family
from common.composed.flux import Flux
from common.composed.policy import ComposedBatch, ComposedPolicy, lay_out_texts
from common.composed.qwen_image import QwenImage
from common.composed.sd3 import SD3
from common.composed.source import INDEX, PIPELINE, REASONER, Source
from common.policy import Guidance, OpenPolicy, Outline
from common.rundir import replacing_directory

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
}


@dataclass(frozen=True)
class Composed(OpenPolicy):
    """The trained halves, and the pipeline whose text encoders and autoencoder are frozen (None: left out)."""

    policy: ComposedPolicy
    chat: TemplateChat
    family: Family
    pipeline: Any
    source: Source

    @property
    def token_dim(self) -> int:
        return self.family.token_dim

    @property
    def reasoner(self) -> Path:
        return self.source.reasoner

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.family.grid(height, width)

    def context(self, texts: list[list[int]]) -> Conditioning:
        return self.family.encode(self.pipeline, [self.chat.final_prompt(text) for text in texts])

    def pack(
        self,
        texts: Sequence[tuple[list[int], list[int]]],
        x_t: Tensor,
        t: Tensor,
        owner: Tensor,
        grid: tuple[int, int],
        guidance: Guidance | None = None,
    ) -> ComposedBatch:
        """The final prompts are encoded here again: their ids are all that a chain carries, its embeddings would be
        as large as its latents, and the encoders never change."""
        whole = [[*prompt, *response] for prompt, response in texts]
        scored = [(len(prompt), len(prompt) + len(response)) for prompt, response in texts]
        conditioning = self.context([self.chat.context_ids(prompt, response) for prompt, response in texts])
        return ComposedBatch(*lay_out_texts(whole, scored, x_t.device), x_t, t, owner, conditioning, grid)

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        unit = (self.pixels(latents, grid) / 2 + 0.5).clamp(0, 1)
        return (255 * unit).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def pixels(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.family.decode(self.pipeline, latents, grid).float()

    def save(self, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Both halves under one directory, each readable by its own library; frozen parts are linked where the file
        system can, copied where it cannot."""
        tensors = weights or self.policy.state_dict()
        with replacing_directory(directory) as aside:
            _write_half(self.source.reasoner, aside / REASONER, tensors, self.policy.reasoner, "reasoner.", "model")
            _copy(self.source.pipeline, aside / PIPELINE, skip="transformer")
            _write_half(
                self.source.pipeline / "transformer",
                aside / PIPELINE / "transformer",
                tensors,
                self.policy.transformer,
                "transformer.",
                "diffusion_pytorch_model",
            )


def check(source: Source) -> Outline:
    """Cheap look: JSON, tokenizer, headers of all weight files. CheckpointError naming what cannot be used."""
    config = read_json(source.reasoner / "config.json")
    vocab, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    if not isinstance(vocab, int) or not isinstance(positions, int):
        raise CheckpointError(
            f"{source.reasoner}/config.json has no vocab_size and max_position_embeddings; give a causal language model"
        )
    family, parts = read_index(source)
    for directory in (source.reasoner, *(source.pipeline / name for name in parts)):
        if directory == source.reasoner or (directory / "config.json").is_file():
            _held_tensors(directory)
    chat = TemplateChat.read(source.reasoner, vocab)
    return Outline(chat, positions, family.grid, family.token_dim, lambda: skeleton(source), guided=False)


def skeleton(source: Source) -> ComposedPolicy:
    """The trained halves without their numbers: meta tensors, from the JSON files alone. CheckpointError."""
    family, parts = read_index(source)
    with torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(source.reasoner, local_files_only=True, trust_remote_code=False)
            reasoner = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source.reasoner} does not describe a causal language model ({error})") from error
        if fused := next((name for name, p in reasoner.named_parameters() if "expert" in name and p.ndim > 2), None):
            raise CheckpointError(
                f"{source.reasoner} is a mixture of experts ({fused}), whose weights vLLM holds in another form; give "
                "a dense model"
            )
        transformer = _described(_class(parts["transformer"]), source.pipeline / "transformer")
    return ComposedPolicy(reasoner, transformer, family).eval()


def frozen_skeletons(source: Source) -> dict[str, nn.Module]:
    """The pipeline's other models, text encoders and autoencoder, without their numbers."""
    _, parts = read_index(source)
    models = {name: _class(kind) for name, kind in parts.items() if name != "transformer"}
    with torch.device("meta"):
        return {
            name: _described(kind, source.pipeline / name).eval()
            for name, kind in models.items()
            if issubclass(kind, nn.Module)
        }


def _described(kind: Any, directory: Path) -> Any:
    """A model as its config.json describes it. CheckpointError."""
    config = read_json(directory / "config.json")
    try:
        if kind.__module__.startswith("diffusers"):
            return kind.from_config(config)
        return kind(kind.config_class.from_dict(config))
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}/config.json does not describe a {kind.__name__} ({error})") from error


def read_index(source: Source) -> tuple[Family, dict[str, tuple[str, str]]]:
    """The family of a pipeline, and its parts' (library, class) by name. CheckpointError if it is not a supported
    flow-matching pipeline or names a class outside transformers and diffusers."""
    path = source.pipeline / INDEX
    index = read_json(path)
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{path} is a {name}, which is not a flow-matching pipeline that can be trained here; "
            f"give one of {', '.join(FAMILIES)}"
        )
    parts = {k: tuple(v) for k, v in index.items() if isinstance(v, list) and len(v) == 2 and all(v)}
    for part, (library, kind) in parts.items():
        if library not in ("diffusers", "transformers") or not hasattr(importlib.import_module(library), kind):
            raise CheckpointError(f"{path}: {part} is {library}.{kind}, which neither transformers nor diffusers has")
    scheduler = parts.get("scheduler", ("", "no scheduler"))[1]
    if not scheduler.startswith("FlowMatchEuler"):
        raise CheckpointError(
            f"{path}: the scheduler is {scheduler}; flow matching has a FlowMatchEulerDiscreteScheduler"
        )
    transformer, vae = (read_json(source.pipeline / part / "config.json") for part in ("transformer", "vae"))
    return FAMILIES[name](transformer, vae, source.guidance), parts


def load(source: Source, dtype: torch.dtype, device: str, frozen: torch.dtype | None) -> Composed:
    """dtype: of the trained halves; frozen: of text encoders and autoencoder, None to leave them out.

    CheckpointError; nothing is returned half loaded.
    """
    family, parts = read_index(source)
    reasoner = _load_module(AutoModelForCausalLM, source.reasoner, dtype)
    transformer = _load_module(_class(parts["transformer"]), source.pipeline / "transformer", dtype)
    policy = ComposedPolicy(reasoner, transformer, family).eval().to(device)
    _check_finite(policy.reasoner, source.reasoner)
    _check_finite(policy.transformer, source.pipeline / "transformer")
    chat = TemplateChat.read(source.reasoner, policy.vocab_size)
    pipeline = None
    if frozen is not None:
        others = {
            name: _load_part(_class(kind), source.pipeline / name, frozen)
            for name, kind in parts.items()
            if name != "transformer"
        }
        for name, part in others.items():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False).to(device)
                _check_finite(part, source.pipeline / name)
        index = read_json(source.pipeline / INDEX)
        absent = {name: None for name, value in index.items() if value == [None, None]}
        kind = getattr(importlib.import_module("diffusers"), index["_class_name"])
        pipeline = kind(**others, **absent, transformer=policy.transformer)
    return Composed(policy, chat, family, pipeline, source)


def _check_finite(module: nn.Module, directory: Path) -> None:
    check_finite(module.named_parameters(), _held_tensors(directory), directory)


def _class(kind: tuple[str, str]) -> Any:
    return getattr(importlib.import_module(kind[0]), kind[1])


def _load_part(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    """A component of a pipeline: a model, or a tokenizer or scheduler, which have no weights."""
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return _load_module(kind, directory, dtype)
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: {kind.__name__} cannot be read ({error})") from error


def _load_module(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    """A model with exactly the tensors of its files. CheckpointError otherwise: both libraries would go on with random
    weights in place of missing ones."""
    of_transformers = kind.__module__.startswith("transformers")
    # With mismatches ignored, transformers names them; diffusers names them in its error.
    options = {"dtype": dtype, "ignore_mismatched_sizes": True} if of_transformers else {"torch_dtype": dtype}
    held = _held_tensors(directory)
    try:
        model, info = kind.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be loaded as {kind.__name__} ({error})") from error
    for what, key in (("is missing", "missing_keys"), ("is not part of the configured model", "unexpected_keys")):
        if info[key]:
            file = held.get(min(info[key]), _table_of_contents(directory))
            raise CheckpointError(f"{file}: tensor {min(info[key])} {what} ({len(info[key])} such)")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        file = held.get(name, _table_of_contents(directory))
        raise CheckpointError(f"{file}: tensor {name} has shape {tuple(found)}, config.json says {tuple(wanted)}")
    return model


def _table_of_contents(directory: Path) -> Path:
    """Where to look for a tensor that no file holds under its own name: the index of several files, or the only one."""
    files = sorted(directory.glob("*.safetensors.index.json")) or sorted(directory.glob("*.safetensors"))
    return files[0] if len(files) == 1 else directory


def _held_tensors(directory: Path) -> dict[str, Path]:
    """The file of every tensor. CheckpointError if a directory has no safetensors, or one has no sound header."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLES)
        held = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights"
        raise CheckpointError(f"{directory} holds {held}; give a checkpoint saved as safetensors")
    tensors: dict[str, Path] = {}
    for path in files:
        with opened(path) as file:
            tensors |= dict.fromkeys(file.keys(), path)
    return tensors


def _write_half(
    source: Path, target: Path, weights: dict[str, Tensor], module: nn.Module, prefix: str, stem: str
) -> None:
    """Everything of a model's directory but its weights, and these as one file. A tied tensor is written once: with
    two copies that differ, transformers would untie them."""
    tied = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
    again = {name for name, p in module.named_parameters(remove_duplicate=False) if tied[id(p)] != name}
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    _copy(source, target, weights=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items() if name not in again}
    save_file(tensors, target / f"{stem}.safetensors", metadata={"format": "pt"})


def _copy(source: Path, target: Path, skip: str = "", weights: bool = True) -> None:
    """A directory's files, weights as hard links where possible; pickles and the directory `skip` are left out."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_dir() and weights and path.name != skip and not path.name.startswith("."):
            _copy(path, target / path.name)
        heavy = ".safetensors" in path.name
        if path.is_file() and path.suffix not in PICKLES and (weights or not heavy):
            try:
                (os.link if heavy else shutil.copy)(path.resolve(), target / path.name)
            except OSError:
                shutil.copy(path, target / path.name)
