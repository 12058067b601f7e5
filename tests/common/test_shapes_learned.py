"""The learned scorer: its exam by hand, its reading of rendered scenes, its gradient, and that it can be fooled."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from common.bagel.vae import from_uint8, to_uint8
from common.shapes import prompts as shapes_prompts
from common.shapes.detect import detect
from common.shapes.fit_learned import IGNORED, draw_examples, fit, roughen
from common.shapes.learned import NOTHING, WEIGHTS, SceneReader, expected_exam, learned_score, load_reader
from common.shapes.reasoning import ideal_detections
from common.shapes.scene import Item, Scene, render
from common.shapes.score import exam, points, strict
from common.shapes.supervised import careful, careless
from common.shapes.vocab import CELLS, COLORS, SHAPES

HELDOUT = shapes_prompts.load(shapes_prompts.DATA / "heldout.jsonl")


@pytest.fixture(scope="module")
def reader() -> SceneReader:
    return load_reader()


def test_certain_readings_give_the_share_of_the_exam() -> None:
    rng = np.random.default_rng(0)
    two = [{"class": "circle", "count": 1, "color": color} for color in ("red", "blue")]
    twice = {"prompt": "a red circle and a blue circle", "tag": "color_attr", "include": two}
    for record in (*HELDOUT[::5], twice):
        for make in (careful, careless):
            _, scene = make(record, rng)
            shapes, colors = torch.zeros(1, 4, 6), torch.full((1, 4, 6), 1 / 6)
            shapes[..., NOTHING] = 1
            for item in scene.items:
                cell = list(CELLS).index(item.cell)
                shapes[0, cell] = torch.eye(6)[SHAPES.index(item.shape)]
                colors[0, cell] = torch.eye(6)[list(COLORS).index(item.color)]
            found = ideal_detections(scene)
            kept_out = {name: yes for name, yes in points(record, found).items() if name.startswith("fewer")}
            answers = [*exam(record, found).values(), *kept_out.values()]
            assert expected_exam(record, shapes, colors).item() == pytest.approx(np.mean(answers), abs=1e-6)


def test_uncertain_readings_give_the_expectation_over_scenes() -> None:
    asked = {"tag": "counting", "include": [{"class": "circle", "count": 2, "color": "red"}], "exclude": []}
    generator = torch.Generator().manual_seed(0)
    shapes, colors = (torch.rand(1, 4, 6, generator=generator).softmax(-1) for _ in range(2))
    circle, red = shapes[0, :, 0], colors[0, :, 0]
    expected = 0.0
    for states in product(range(3), repeat=4):  # red circle, other circle, anything else
        p = torch.stack([circle * red, circle * (1 - red), 1 - circle])[list(states), range(4)].prod()
        circles, reds = sum(s < 2 for s in states), states.count(0)
        expected += p.item() * ((circles > 0) + (circles == 2) + (reds >= 2)) / 3
    assert expected_exam(asked, shapes, colors).item() == pytest.approx(expected, abs=1e-5)


def test_the_shipped_reader_reads_scenes_it_has_not_seen(reader: SceneReader) -> None:
    images, labels = draw_examples(500, np.random.default_rng(12345))
    pixels = roughen(from_uint8(torch.from_numpy(images)), torch.Generator().manual_seed(1))
    shapes, colors = (logits.argmax(-1).numpy() for logits in reader(pixels))
    there = labels[..., 1] != IGNORED
    assert (shapes == labels[..., 0]).mean() > 0.99
    assert (colors == labels[..., 1])[there].mean() > 0.99
    assert WEIGHTS.stat().st_size < 1 << 20


def test_right_pictures_score_above_wrong_ones(reader: SceneReader) -> None:
    rng = np.random.default_rng(0)
    asked = HELDOUT[::4]
    scores = []
    for make in (careful, careless):
        images = np.stack([render(make(record, rng)[1], rng) for record in asked])
        scores.append(learned_score(reader, from_uint8(torch.from_numpy(images)), asked))
    right, wrong = scores
    assert right.min() > wrong.mean()
    assert (right > wrong).float().mean() > 0.98


def test_its_gradient_finds_pictures_that_only_it_believes(reader: SceneReader) -> None:
    asked = {
        "tag": "colors",
        "include": [{"class": "circle", "count": 1, "color": "red"}],
        "exclude": [{"class": "object", "count": 2}],
    }
    wrong = Scene((Item("blue", "square", "top left"),))
    pixels = from_uint8(torch.from_numpy(render(wrong, np.random.default_rng(0))[None])).requires_grad_()
    before = learned_score(reader, pixels, [asked]).item()
    for _ in range(100):
        (gradient,) = torch.autograd.grad(learned_score(reader, pixels, [asked]).sum(), pixels)
        pixels = (pixels + 0.02 * gradient.sign()).clamp(-1, 1).detach().requires_grad_()
    shown = to_uint8(pixels.detach())
    assert before < 0.5 < 0.8 < learned_score(reader, from_uint8(shown), [asked]).item()
    assert not strict(asked, detect(shown[0].numpy()))


def test_larger_images_are_read_too(reader: SceneReader) -> None:
    image = render(Scene((Item("green", "ring", "bottom right"),)), np.random.default_rng(0))
    small = from_uint8(torch.from_numpy(image[None]))
    asked = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "green"}], "exclude": []}
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert learned_score(reader, large, [asked]).item() == pytest.approx(
        learned_score(reader, small, [asked]).item(), abs=0.05
    )


def test_fitting_learns_and_repeats() -> None:
    first, second = (fit(seed=3, steps=2, images=32).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    images, labels = draw_examples(64, np.random.default_rng(5))
    untrained, trained = SceneReader(), fit(seed=3, steps=30, images=256)
    pixels = from_uint8(torch.from_numpy(images))
    losses = [
        torch.nn.functional.cross_entropy(reader(pixels)[0].flatten(0, 1), torch.from_numpy(labels[..., 0]).flatten())
        for reader in (untrained, trained)
    ]
    assert losses[1] < losses[0] - 0.1
