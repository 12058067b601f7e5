"""The detector, on clean, noisy, blurred and foreign images."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from common.shapes.detect import detect
from common.shapes.scene import Item, Scene, render
from common.shapes.vocab import CELLS, COLORS, SHAPES

Image = NDArray[np.uint8]


def _scene(rng: np.random.Generator) -> Scene:
    cells = rng.permutation(list(CELLS))[: rng.integers(1, 5)]
    return Scene(tuple(Item(str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)), str(cell)) for cell in cells))


def _found(image: Image) -> list[tuple[str, str, str]]:
    def cell(box: tuple[float, float, float, float]) -> str:
        row = "top" if box[1] + box[3] < 32 else "bottom"
        return f"{row} {'left' if box[0] + box[2] < 32 else 'right'}"

    return sorted((d.color, d.shape, cell(d.box)) for d in detect(image))


def _accuracy(number: int, spoil: Callable[[Image, np.random.Generator], NDArray[np.floating]] | None = None) -> float:
    rng = np.random.default_rng(0)
    right = 0
    for _ in range(number):
        scene = _scene(rng)
        image = render(scene, rng)
        if spoil:
            image = np.clip(spoil(image, rng), 0, 255).astype(np.uint8)
        right += _found(image) == sorted((item.color, item.shape, item.cell) for item in scene.items)
    return right / number


def _blurred(image: Image, sigma: float) -> NDArray[np.floating]:
    return ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))


def test_clean_scenes() -> None:
    assert _accuracy(2500) >= 0.995


def test_noise() -> None:
    assert _accuracy(800, lambda image, rng: image + rng.normal(0, 8, image.shape)) >= 0.995


def test_blur() -> None:
    assert _accuracy(800, lambda image, rng: _blurred(image, 0.8)) >= 0.995


def test_blur_and_noise() -> None:
    assert _accuracy(800, lambda image, rng: _blurred(image, 0.8) + rng.normal(0, 8, image.shape)) >= 0.99


def test_an_empty_or_dusty_canvas_has_no_objects() -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    assert detect(image) == []
    image[4:7, 4:7] = COLORS["red"]
    assert detect(image) == []


@pytest.mark.parametrize(
    ("rows", "cols"), [(slice(2, 30), slice(4, 8)), (slice(10, 13), slice(0, 32))], ids=["bar", "stripe"]
)
def test_a_blob_like_no_shape_is_unknown(rows: slice, cols: slice) -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    image[rows, cols] = COLORS["blue"]
    (found,) = detect(image)
    assert (found.shape, found.color) == ("unknown", "blue")
    assert found.box == (cols.start, rows.start, cols.stop, rows.stop)


def test_a_flooded_canvas_is_no_square() -> None:
    image = np.full((32, 32, 3), COLORS["red"], np.uint8)
    assert [(d.shape, d.color) for d in detect(image)] == [("unknown", "red")]


def test_an_angle_is_unknown() -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    image[4:16, 4:7] = image[13:16, 4:16] = COLORS["black"]
    assert [d.shape for d in detect(image)] == ["unknown"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_other_sizes(shape: str) -> None:
    image = render(Scene((Item("red", shape, "top left"),)), np.random.default_rng(3))
    large = ndimage.zoom(image.astype(float), (2, 2, 1), order=1).clip(0, 255).astype(np.uint8)
    assert [d.shape for d in detect(large)] == [shape]


@pytest.mark.parametrize(
    "image", [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3)), np.zeros((3, 32, 32), np.uint8)]
)
def test_other_arrays_are_refused(image: Image) -> None:
    with pytest.raises(ValueError, match=r"give uint8 \[H, W, 3\]"):
        detect(image)


def test_fast_enough() -> None:
    rng = np.random.default_rng(0)
    images = [render(_scene(rng), rng) for _ in range(50)]

    def seconds() -> float:
        start = time.process_time()
        for image in images:
            detect(image)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) / len(images) < 2e-3
