"""Makes the learned scorer's weights from rendered scenes: `python -m common.shapes.fit_learned` (two minutes).

Mild noise and blur stand for what an autoencoder does to an image; nothing else that a policy may draw is in the data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from common.rundir import replacing
from common.shapes.learned import NOTHING, WEIGHTS, SceneReader
from common.shapes.scene import Item, Scene, render
from common.shapes.vocab import CELLS, COLORS, SHAPES

IMAGES, STEPS, BATCH, RATE = 12_000, 1500, 128, 3e-3
NOISE, BLUR = 0.1, 0.5  # at most: standard deviation in units of [-1, 1]; share of the neighbours' mean
SMOOTHING = 0.05  # of the labels: a reward that is never certain keeps a gradient
IGNORED = -100


def draw_examples(count: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [M, 32, 32, 3] and labels [M, 4, 2]: shape and color of every cell, the color IGNORED where nothing is."""
    labels = np.stack([rng.integers(len(SHAPES), size=(count, 4)), rng.integers(len(COLORS), size=(count, 4))], -1)
    empty = rng.random((count, 4)) < rng.random((count, 1))
    labels[empty] = NOTHING, IGNORED
    names = list(COLORS)
    scenes = (
        Scene(
            tuple(
                Item(names[color], SHAPES[shape], cell)
                for cell, (shape, color) in zip(CELLS, row, strict=True)
                if shape != NOTHING
            )
        )
        for row in labels
    )
    return np.stack([render(scene, rng) for scene in scenes]), labels


def roughen(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [M, 3, H, W] with its own amount of blur and noise."""
    amount = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels.lerp(blurred, BLUR * amount[0]) + NOISE * amount[1] * noise


def fit(seed: int = 0, steps: int = STEPS, images: int = IMAGES) -> SceneReader:
    """A reader trained from nothing."""
    from common.bagel.vae import from_uint8

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    drawn, told = draw_examples(images, np.random.default_rng(seed))
    pixels, labels = from_uint8(torch.from_numpy(drawn)), torch.from_numpy(told)
    reader = SceneReader()
    optimizer = torch.optim.AdamW(reader.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(pixels), (BATCH,), generator=generator)
        shapes, colors = reader(roughen(pixels[chosen], generator))
        loss = F.cross_entropy(shapes.flatten(0, 1), labels[chosen, :, 0].flatten(), label_smoothing=SMOOTHING)
        loss = loss + F.cross_entropy(
            colors.flatten(0, 1), labels[chosen, :, 1].flatten(), label_smoothing=SMOOTHING, ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)
    return reader


def main(path: Path) -> None:
    """Fits and writes."""
    with replacing(path) as aside:
        save_file(fit().state_dict(), aside)
        aside.chmod(0o644)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)
