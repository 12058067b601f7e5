"""An open_clip model from options: where its weights come from, and what is refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from common import torchvision_cpu
from common.checkpoint_files import PICKLES
from common.config import ConfigError, Count, Section, resolve_path

RANDOM = "random"
_SAFE = ".safetensors"
_HUB, _DIRECTORY = "hf-hub:", "local-dir:"

log = logging.getLogger(__name__)


class ClipOptions(Section):
    """Which open_clip model scores, and how."""

    model: str | None = None
    """A model name of open_clip (ViT-B-32), or its local-dir:PATH and hf-hub:ORG/NAME, which bring their weights."""
    config: str | None = None
    """Instead of model: an open_clip JSON configuration (embed_dim, vision_cfg, text_cfg) on disk."""
    pretrained: str | None = None
    """Weights: a tag of open_clip, a .safetensors file, or "random" for an untrained model, whose scores mean nothing
    and serve tests only. Left out for local-dir: and hf-hub:."""
    seed: int = 0
    """Seed of pretrained: random."""
    batch_size: Count = 64
    """Images encoded at once."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What the cosine similarity is multiplied by."""

    @property
    def brings_weights(self) -> bool:
        """Whether the model's name says where its weights are."""
        return (self.model or "").startswith((_HUB, _DIRECTORY))

    @property
    def weights_file(self) -> bool:
        """Whether `pretrained` is a path rather than a tag."""
        return self.pretrained is not None and self.pretrained.endswith((_SAFE, *PICKLES))

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise ValueError(f"model is {self.model!r} and config is {self.config!r}; give one of the two")
        if self.weights_file and not str(self.pretrained).endswith(_SAFE):
            raise ValueError(f"pretrained is {self.pretrained!r}, a pickle, which can run code; convert it to {_SAFE}")
        if self.pretrained is None and not self.brings_weights:
            raise ValueError(f"pretrained is missing; give a tag of open_clip, a {_SAFE} file, or {RANDOM} in a test")
        if self.brings_weights and self.pretrained not in (None, RANDOM):
            raise ValueError(f"pretrained is {self.pretrained!r} but {self.model} brings its weights; leave it out")
        return self


@dataclass(frozen=True)
class ClipModel:
    """A CLIP on its device, in evaluation mode, with its preprocessing of a PIL image and its tokenizer."""

    clip: Any
    preprocess: Callable[[Any], Any]
    tokenize: Callable[[list[str]], Any]
    device: str


def load_clip(options: ClipOptions) -> ClipModel:
    """Builds the model on a GPU if this process has one. ConfigError if the model or its weights cannot be found,
    or the weights are no safetensors. Downloads only where HF_HUB_OFFLINE is 0."""
    torchvision_cpu.patch()
    import open_clip
    import torch

    name, source = _name(options), options.pretrained
    settings: dict[str, Any] = {"pretrained_text": False, "pretrained_image": False}
    if source == RANDOM:
        log.warning("clip_score: %s is an untrained model; its scores mean nothing", name)
        settings |= {"pretrained": None, "load_weights": False}
    elif options.weights_file:
        settings |= {"pretrained": str(resolve_path(str(source))), "require_pretrained": True}
    else:
        quick_gelu = _find_weights(name, source)
        settings |= {"pretrained": source, "require_pretrained": True, "force_quick_gelu": quick_gelu}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            clip, _, preprocess = open_clip.create_model_and_transforms(name, device=device, **settings)
        tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"reward clip_score: open_clip cannot load {name} with weights {source}: {error}") from error
    return ClipModel(clip.eval(), preprocess, tokenize, device)


def _name(options: ClipOptions) -> str:
    """The name open_clip knows the model by, after a local configuration has been registered."""
    import open_clip

    if options.config is not None:
        path = resolve_path(options.config)
        if path.suffix == ".json":
            open_clip.add_model_config(path)
        if path.suffix != ".json" or path.stem not in open_clip.list_models():
            raise ConfigError(
                f"reward clip_score: config {path} is no open_clip configuration; give a .json file with embed_dim, "
                "vision_cfg and text_cfg"
            )
        return path.stem
    assert options.model is not None
    if not options.brings_weights and options.model.replace("/", "-") not in open_clip.list_models():
        raise ConfigError(
            f"reward clip_score: open_clip has no model {options.model}; see open_clip.list_models(), or give a "
            "local-dir: or a config"
        )
    if options.model.startswith(_DIRECTORY):
        return _DIRECTORY + str(resolve_path(options.model.removeprefix(_DIRECTORY)))
    return options.model


def _find_weights(name: str, tag: str | None) -> bool:
    """Checks that the file open_clip is going to choose exists and is safetensors; returns whether the weights were
    trained with QuickGELU, which open_clip by itself only warns about."""
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    if name.startswith(_DIRECTORY):
        files = sorted(Path(name.removeprefix(_DIRECTORY)).iterdir())
        if pickles := [file.name for file in files if file.suffix in PICKLES]:
            raise ConfigError(f"reward clip_score: {name} holds the pickle {pickles[0]}, which can run code; remove it")
        if not any(file.suffix == _SAFE for file in files):
            raise ConfigError(f"reward clip_score: {name} holds no {_SAFE} file; put the weights there")
        return False
    settings: dict[str, Any] = {}
    if name.startswith(_HUB):
        repository, file = name.removeprefix(_HUB), None
    else:
        model = name.replace("/", "-")
        settings = open_clip.get_pretrained_cfg(model, str(tag))
        if not settings:
            known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise ConfigError(f"reward clip_score: {name} has no pretrained weights {tag}; its tags: {known}")
        if not settings.get("hf_hub"):
            raise ConfigError(
                f"reward clip_score: {tag} of {name} is published as a pickle only, which can run code; convert it to "
                f"{_SAFE} and give the file as pretrained"
            )
        repository, _, file = settings["hf_hub"].rpartition("/")
    try:
        path = PurePath(download_pretrained_from_hf(repository, filename=file or None))
    except FileNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
        why = "offline (HF_HUB_OFFLINE) and they are not in the Hugging Face cache" if offline else f"{error}"
        raise ConfigError(
            f"reward clip_score: no weights {tag or ''} for {name}: {why}; fill the cache on a connected machine, "
            f"start with HF_HUB_OFFLINE=0, or give a {_SAFE} file as pretrained"
        ) from error
    if path.suffix != _SAFE:
        raise ConfigError(f"reward clip_score: {Path(path)} is a pickle, which can run code; convert it to {_SAFE}")
    return bool(settings.get("quick_gelu"))
