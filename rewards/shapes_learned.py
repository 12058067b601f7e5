"""The shapes task judged by a learned, differentiable network: a reward that can be hacked, and that ReFL follows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.shapes.score import validate_metadata
from common.types import Prompt
from rewards.scorer import Scorer, ScorerOutput


class LearnedShapesScorer(Scorer):
    """Expected share of right exam answers, in [0, 1], as the network of `common/shapes/learned.py` reads the image.
    The truth is reward `shapes`, which a recipe may list beside it with weight 0."""

    def __init__(self, options: Any) -> None:
        from common.shapes.learned import load_reader

        self._reader = load_reader()

    def score(self, images: NDArray[np.uint8], prompts: list[Prompt]) -> ScorerOutput:
        import torch

        from common.bagel.vae import from_uint8
        from common.shapes.learned import learned_score

        with torch.inference_mode():
            pixels = from_uint8(torch.from_numpy(images))
            return ScorerOutput(learned_score(self._reader, pixels, [p.metadata for p in prompts]).numpy())

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        validate_metadata(dict(prompt.metadata))
