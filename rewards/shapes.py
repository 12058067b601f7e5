"""The shapes task's own reward: a detector's boxes, judged by GenEval's rules."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.config import Section
from common.shapes.detect import detect
from common.shapes.score import partial, strict, text_alignment, validate_metadata
from common.types import Prompt
from rewards.scorer import Scorer, ScorerOutput


class ShapesOptions(Section):
    """What the value is."""

    mode: Literal["partial", "strict"] = "partial"
    """partial: mean credit over the exam points, in [0, 1]; strict: 1 if every point holds, else 0."""


class ShapesScorer(Scorer):
    """Does the picture show what the prompt's metadata asks for? Both modes are recorded as components, and so is
    the TA-like score, `ta`."""

    options_model = ShapesOptions

    def __init__(self, options: ShapesOptions) -> None:
        self._mode = options.mode

    def score(self, images: NDArray[np.uint8], prompts: list[Prompt]) -> ScorerOutput:
        found = [detect(image) for image in images]
        pairs = [(prompt.metadata, boxes) for prompt, boxes in zip(prompts, found, strict=True)]
        components = {
            "partial": np.array([partial(*pair) for pair in pairs], np.float32),
            "strict": np.array([strict(*pair) for pair in pairs], np.float32),
            "ta": np.array([text_alignment(*pair) for pair in pairs], np.float32),
        }
        return ScorerOutput(components[self._mode], components)

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        validate_metadata(dict(prompt.metadata))
