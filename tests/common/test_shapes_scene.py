"""Scenes and their images."""

from __future__ import annotations

import numpy as np
import pytest

from common.shapes.scene import Item, Scene, render
from common.shapes.vocab import BACKGROUND, CELLS, COLORS, RIDDLES, SHAPES


def test_two_items_in_one_cell_are_refused() -> None:
    items = (Item("red", "circle", "top left"), Item("blue", "ring", "top left"))
    with pytest.raises(ValueError, match=r"top left.*cell of its own"):
        Scene(items)


@pytest.mark.parametrize("words", [("pink", "circle", "top left"), ("red", "blob", "top left"), ("red", "ring", "top")])
def test_unknown_words_are_refused_by_name(words: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="use one of"):
        Item(*words)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_render_fills_only_its_cell(shape: str, color: str) -> None:
    image = render(Scene((Item(color, shape, "bottom left"),)), np.random.default_rng(0))
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert (image[:16] == BACKGROUND).all()
    assert (image[:, 16:] == BACKGROUND).all()
    assert (image[16:, :16] == COLORS[color]).all(-1).sum() > 40


def test_neighbours_never_touch() -> None:
    scene = Scene(tuple(Item("white", "circle", cell) for cell in CELLS))
    for seed in range(50):
        cover = (render(scene, np.random.default_rng(seed))[..., 0].astype(float) - 128) / (250 - 128)
        # a gap of 1.6 px leaves the pair of pixel columns in the middle at most partly covered
        assert cover[:, 15:17].sum(1).max() < 1


def test_render_is_a_function_of_the_rng() -> None:
    scene = Scene((Item("green", "cross", "top right"),))
    first, second, third = (render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == second).all()
    assert (first != third).any()


def test_no_riddle_phrase_hides_another() -> None:
    phrases = [riddle.phrase for riddle in RIDDLES]
    assert len(set(phrases)) == len(phrases)
    assert not [(a, b) for a in phrases for b in phrases if a != b and a in b]
