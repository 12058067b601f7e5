"""Names, options and the shapes scorer, without Ray."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from common.config import ConfigError, Reward
from common.shapes.scene import Item, Scene, render
from common.types import Prompt
from rewards.scorer import build, check_options, check_prompts, scorer_class

RED_CIRCLE = Scene((Item("red", "circle", "top left"),))
BLUE_SQUARE = Scene((Item("blue", "square", "bottom right"),))
METADATA = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "exclude": []}


def _prompt(metadata: dict[str, Any] | None = None) -> Prompt:
    return Prompt("colors-0001", "a photo of a red circle", METADATA if metadata is None else metadata)


@pytest.mark.parametrize("mode", ["partial", "strict"])
def test_shapes_rewards_the_truth_and_not_another_picture(mode: str) -> None:
    rng = np.random.default_rng(0)
    empty = np.full((32, 32, 3), 255, np.uint8)
    blue_circle = Scene((Item("blue", "circle", "top left"),))
    images = np.stack([*(render(scene, rng) for scene in (RED_CIRCLE, BLUE_SQUARE, blue_circle)), empty])
    output = build("shapes", {"mode": mode}).score(images, [_prompt()] * 4)
    assert output.values.dtype == np.float32
    np.testing.assert_array_equal(output.components["strict"], [1, 0, 0, 0])
    np.testing.assert_allclose(output.components["partial"], [1, 0, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(output.components["ta"], [1, 0, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_array_equal(output.values, output.components[mode])


def test_the_learned_scorer_judges_like_the_detector_on_rendered_scenes() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([render(scene, rng) for scene in (RED_CIRCLE, BLUE_SQUARE)])
    output = build("shapes_learned", {}).score(images, [_prompt()] * 2)
    assert output.values.dtype == np.float32
    assert output.values[0] > 0.9 and output.values[1] < 0.2


def test_unknown_name_gets_a_hint() -> None:
    with pytest.raises(
        ConfigError, match=r"clip_scor .*did you mean clip_score\?.*clip_score, http, shapes, shapes_learned"
    ):
        scorer_class("clip_scor")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.scorers:Mine", "no module no_such_package"),
        ("rewards.no_such_module:Mine", "no module rewards.no_such_module"),
        ("rewards.shapes:Missing", "Missing in rewards.shapes is not a subclass"),
        ("rewards.shapes:ShapesOptions", "not a subclass"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scorer_class(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shapes", {"mode": "strikt"}, "reward shapes, options: mode is 'strikt'"),
        ("shapes", {"mod": "strict"}, "mod is not a known key; did you mean mode"),
        ("clip_score", {}, "give one of the two"),
        ("clip_score", {"model": "ViT-B-32", "config": "a.json", "pretrained": "random"}, "give one of the two"),
        ("clip_score", {"model": "ViT-B-32"}, "pretrained is missing"),
        ("clip_score", {"model": "ViT-B-32", "pretrained": "weights/clip.pt"}, "a pickle"),
        ("clip_score", {"model": "local-dir:x", "pretrained": "openai"}, "brings its weights"),
        ("clip_score", {"model": "ViT-B-32", "pretrained": "random", "batch_size": 0}, "batch_size is 0"),
        ("clip_score", {"model": "ViT-B-32", "pretrained": "random", "scale": float("nan")}, "scale is nan"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(name, options)


def test_check_names_the_prompt_and_the_reward() -> None:
    scorers = (Reward(name="shapes"),)
    check_prompts(scorers, [_prompt()], "a.jsonl")
    with pytest.raises(ConfigError, match=r"a.jsonl: prompt colors-0001: include\[0\].class is 'cube'.* reward shapes"):
        check_prompts(scorers, [_prompt({"tag": "colors", "include": [{"class": "cube", "count": 1}]})], "a.jsonl")


def test_checking_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from rewards.scorer import check_options;"
        "check_options('shapes', {}); check_options('shapes_learned', {});"
        "check_options('clip_score', {'model': 'ViT-B-32', 'pretrained': 'random'});"
        "assert not {'torch', 'ray', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
