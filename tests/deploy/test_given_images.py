"""`unigrpo generate --image` and `unigrpo answer`: a policy with a vision tower edits and understands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden_numbers import CHECKPOINT, golden
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from common.bagel import checkpoint as store
from common.bagel import seeing
from common.bagel.config import BagelConfig
from common.bagel.vit import resized
from common.config import REPOSITORY, ConfigError
from common.runtime import thread_env
from deploy.cli import app


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in thread_env(1).items():
        monkeypatch.setenv(name, value)  # and put back afterwards
    path = tmp_path / "image.png"
    Image.fromarray(golden("bagel/vit.npz")["image_uint8"]).save(path)
    return path


def run(*arguments: str) -> str:
    """What the command prints; raises what it raises."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def edited(out: Path, *arguments: str) -> list[NDArray[np.uint8]]:
    run("generate", str(CHECKPOINT), *arguments, "-o", str(out))
    rows = json.loads((out / "generated.json").read_text())["images"]
    assert all("reasoning" in row for row in rows)  # what a random model writes may decode to nothing
    return [np.array(Image.open(out / row["image"])) for row in rows]


def test_an_image_is_changed_as_instructed(image: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    cfg = {"text_scale": 4.0, "image_scale": 1.5}
    recipe.write_text(json.dumps({"sampling": {"max_tokens": 4}, "evaluation": {"points": 3, "cfg": cfg}}))
    how = ("--image", str(image), "--recipe", str(recipe), "-n", "2")
    first, second = edited(tmp_path / "a", "Make the square yellow.", *how)
    config = BagelConfig.read(CHECKPOINT)
    side = config.max_latent_size * config.pixels_per_token
    shape = resized(np.array(Image.open(image)), side, side // 2, config.pixels_per_token).shape
    assert first.shape == second.shape == shape and (first != second).any()
    again, _ = edited(tmp_path / "b", "Make the square yellow.", *how)
    other, _ = edited(tmp_path / "c", "Remove the circle.", *how)
    assert (first == again).all() and (first != other).any()
    assert (edited(tmp_path / "d", "Make the square yellow.", *how, "--seed", "1")[0] != first).any()


def test_a_question_about_an_image_is_answered(image: Path, tmp_path: Path) -> None:
    (recipe := tmp_path / "recipe.yaml").write_text('{"sampling": {"max_tokens": 8}, "rollout": {"dtype": "float32"}}')
    said = run("answer", str(CHECKPOINT), "How many circles?", str(image), "--recipe", str(recipe))
    pixels = np.array(Image.open(image))
    wanted = seeing.answer(store.load(CHECKPOINT, understanding=True), pixels, "How many circles?", 8)
    assert said == wanted + "\n"


def test_what_cannot_be_seen(image: Path, tiny_models: Path, tmp_path: Path) -> None:
    (text := tmp_path / "image.txt").write_text("no image")
    blind = str(REPOSITORY / "deploy" / "models" / "shapes")
    (recipe := tmp_path / "composed.yaml").write_text(json.dumps({"model": {"pipeline": str(tiny_models / "sd3")}}))
    with pytest.raises(ConfigError, match=r"image\.txt cannot be read .* give a PNG or JPEG"):
        run("answer", str(CHECKPOINT), "Why?", str(text))
    with pytest.raises(ConfigError, match="question is empty"):
        run("answer", str(CHECKPOINT), " ", str(image))
    with pytest.raises(ConfigError, match="has no vit_config; this checkpoint does not understand images"):
        run("answer", blind, "Why?", str(image))
    with pytest.raises(ConfigError, match="is drawn by a pipeline, from text alone"):
        run("answer", str(tiny_models / "qwen2"), "Why?", str(image), "--recipe", str(recipe))
