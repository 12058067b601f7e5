"""Where the two halves of a composed policy lie; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError, Model, resolve_path

INDEX = "model_index.json"
REASONER, PIPELINE = "reasoner", "pipeline"


@dataclass(frozen=True)
class Source:
    """The reasoner in transformers' layout, the pipeline in diffusers', and the guidance that a guidance-distilled
    transformer is told."""

    reasoner: Path
    pipeline: Path
    guidance: float


def composed_source(model: Model, find: Callable[[str], Path] = resolve_path) -> Source | None:
    """The two directories that a recipe's `model` names, side by side or under one roof; None for BAGEL. find: where
    what is named lies.

    ConfigError if it names a second pipeline.
    """
    path = find(model.path)
    if (path / PIPELINE / INDEX).is_file():
        if model.pipeline:
            raise ConfigError(f"model.pipeline is {model.pipeline} but model.path {path} has its own; leave one out")
        return Source(path / REASONER, path / PIPELINE, model.guidance)
    return Source(path, find(model.pipeline), model.guidance) if model.pipeline else None
