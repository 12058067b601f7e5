"""What a scorer is, and how the name in a recipe becomes one.

Imports neither torch nor Ray: a recipe's rewards are checked before anything starts.
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from common.config import ConfigError, Reward, Section
from common.recipe import explain
from common.types import Prompt

BUILT_IN = {
    "clip_score": "rewards.clip_score:ClipScorer",
    "http": "rewards.http:HttpScorer",
    "shapes": "rewards.shapes:ShapesScorer",
    "shapes_learned": "rewards.shapes_learned:LearnedShapesScorer",
}


class NoOptions(Section):
    """Options of a scorer that has none."""


@dataclass(frozen=True)
class ScorerOutput:
    """Scores of G images. values [G] fp32, of which NaN or infinity stops the run or is masked, as on_nonfinite says;
    components: further columns [G] fp32 for the record; unscorable: indices of the images this scorer cannot judge,
    which are masked, not scored 0."""

    values: NDArray[np.float32]
    components: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    unscorable: tuple[int, ...] = ()


class Scorer(ABC):
    """Judges images against prompts. Built once per actor; what is slow to load is loaded in `__init__`.

    The module of a scorer is imported to check a recipe, so heavy libraries are imported in `__init__`, not on top.
    """

    options_model: ClassVar[type[Section]] = NoOptions
    """Checks the recipe's `options`; `__init__` gets an instance."""

    @abstractmethod
    def __init__(self, options: Any) -> None:
        """`options` is an instance of `options_model`. ConfigError where a file or a setting is missing."""

    @abstractmethod
    def score(self, images: NDArray[np.uint8], prompts: list[Prompt]) -> ScorerOutput:
        """Scores images uint8 [G, H, W, 3], one prompt each. An exception fails the whole group."""

    @classmethod  # noqa: B027 (an optional hook)
    def check_prompt(cls, prompt: Prompt) -> None:
        """Raises ValueError if this scorer cannot judge images of a prompt; called before a run starts."""


def scorer_class(name: str) -> type[Scorer]:
    """The class of a built-in scorer, or of "package.module:Class". ConfigError if there is none."""
    path = BUILT_IN.get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"reward {name} is not known; {hint}known rewards: {', '.join(sorted(BUILT_IN))}, "
            "or package.module:Class for one of your own"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"reward {name}: there is no module {error.name}; correct it or put it on PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise ConfigError(f"reward {name}: {class_name} in {module_name} is not a subclass of rewards.scorer.Scorer")
    return found


def check_options(name: str, options: Mapping[str, Any]) -> Section:
    """A scorer's options, validated. ConfigError names the scorer, the option, its value and the remedy."""
    model = scorer_class(name).options_model
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(f"reward {name}, options: {explain(error, model).removeprefix('config: ')}") from error


def build(name: str, options: Mapping[str, Any]) -> Scorer:
    """A scorer, ready to score. ConfigError as from `check_options`, or from what the scorer loads."""
    return scorer_class(name)(check_options(name, options))


def check(scorers: Iterable[Reward]) -> None:
    """Checks a recipe's rewards, building nothing. ConfigError for the first fault."""
    for scorer in scorers:
        check_options(scorer.name, scorer.options)


def check_prompts(scorers: Iterable[Reward], prompts: Iterable[Prompt], file: str) -> None:
    """Checks every prompt of a file that they will judge. ConfigError for the first fault."""
    judges = {scorer.name: scorer_class(scorer.name) for scorer in scorers}
    for prompt in prompts:
        for name, judge in judges.items():
            try:
                judge.check_prompt(prompt)
            except ValueError as error:
                raise ConfigError(f"{file}: prompt {prompt.id}: {error} (needed by reward {name})") from error
