"""Scenes and their images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.shapes.vocab import BACKGROUND, CELL, CELLS, COLORS, SHAPES, SIZE

JITTER = 1.0  # px, of the centre, on each axis
RADIUS = (5.8, 6.2)  # px; with JITTER this keeps at least 1.6 px between neighbours
_SUPERSAMPLE = 5


def _known(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Item:
    """One object: a color of COLORS, a shape of SHAPES and a cell of CELLS (ValueError otherwise)."""

    color: str
    shape: str
    cell: str

    def __post_init__(self) -> None:
        _known("color", self.color, tuple(COLORS))
        _known("shape", self.shape, SHAPES)
        _known("cell", self.cell, tuple(CELLS))


@dataclass(frozen=True)
class Scene:
    """Objects in distinct cells (ValueError when two share one)."""

    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        cells = [item.cell for item in self.items]
        if len(set(cells)) != len(cells):
            raise ValueError(f"items use the cells {cells}; give every item a cell of its own")


def inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie in a shape of radius 1 about the origin (`u` to the right, `v` down).

    `u` and `v` broadcast against each other; the result has their common shape.
    """
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return (abs(u) <= 0.9) & (abs(v) <= 0.9)
    if shape == "triangle":
        return (v <= 0.85) & (abs(u) <= (v + 1) / 1.85)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 1)
    if shape == "ring":
        return (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.25)
    raise ValueError(f"shape is {shape!r}; use one of {', '.join(SHAPES)}")


def cover(shape: str, radius: float, dx: float, dy: float) -> NDArray[np.float64]:
    """How much of each pixel of a cell, [16, 16], a shape of this radius covers, (dx, dy) px off the centre."""
    ticks = (np.arange(CELL * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - CELL / 2
    hit = inside(shape, (ticks[None, :] - dx) / radius, (ticks[:, None] - dy) / radius)
    return hit.reshape(CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE).mean((1, 3))


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a scene: uint8 [32, 32, 3], anti-aliased, every centre jittered by up to JITTER px."""
    image = np.empty((SIZE, SIZE, 3))
    image[:] = BACKGROUND
    for item in scene.items:
        dx, dy = rng.uniform(-JITTER, JITTER, 2)
        alpha = cover(item.shape, rng.uniform(*RADIUS), dx, dy)[..., None]
        x, y = (c - CELL // 2 for c in CELLS[item.cell])
        window = image[y : y + CELL, x : x + CELL]
        window += alpha * (np.array(COLORS[item.color]) - window)
    return np.rint(image).astype(np.uint8)
