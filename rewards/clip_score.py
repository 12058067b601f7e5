"""CLIP score (Hessel et al. 2021, without the clipping at 0): how close an image is to its prompt's text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.types import Prompt
from rewards.clip_model import ClipOptions, load_clip
from rewards.scorer import Scorer, ScorerOutput


class ClipScorer(Scorer):
    """`scale` times the cosine between the embeddings of image and prompt text, in [-scale, scale]."""

    options_model = ClipOptions

    def __init__(self, options: ClipOptions) -> None:
        self._model = load_clip(options)
        self._options = options

    def score(self, images: NDArray[np.uint8], prompts: list[Prompt]) -> ScorerOutput:
        import torch
        from PIL import Image

        model, texts = self._model, list(dict.fromkeys(prompt.text for prompt in prompts))
        rows = [texts.index(prompt.text) for prompt in prompts]
        step, cosines = self._options.batch_size, []
        with torch.inference_mode():
            wanted = model.clip.encode_text(model.tokenize(texts).to(model.device), normalize=True)[rows]
            for start in range(0, len(images), step):
                batch = [model.preprocess(Image.fromarray(image)) for image in images[start : start + step]]
                shown = model.clip.encode_image(torch.stack(batch).to(model.device), normalize=True)
                cosines.append((shown * wanted[start : start + step]).sum(-1).float().cpu())
        return ScorerOutput((self._options.scale * torch.cat(cosines)).numpy())
