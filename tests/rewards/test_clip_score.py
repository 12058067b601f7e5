"""The CLIP score of a tiny model, against open_clip itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import torchvision_cpu
from common.config import ConfigError
from common.types import Prompt
from rewards.scorer import Scorer, build

torchvision_cpu.patch()

import open_clip  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ("a red circle", "two blue squares left of a ring")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny-clip.json and its weights clip.safetensors."""
    directory = tmp_path_factory.mktemp("clip")
    (directory / "tiny-clip.json").write_text(json.dumps(TINY))
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**TINY).state_dict(), directory / "clip.safetensors")
    return directory


@pytest.fixture(scope="module")
def options(tiny: Path) -> dict[str, Any]:
    return {"config": str(tiny / "tiny-clip.json"), "pretrained": str(tiny / "clip.safetensors")}


@pytest.fixture(scope="module")
def scorer(options: dict[str, Any]) -> Scorer:
    return build("clip_score", options | {"batch_size": 3, "scale": 2.5})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)


def _prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(str(index), text, {}) for index, text in enumerate(texts)]


def test_equals_open_clip(scorer: Scorer, tiny: Path, images: np.ndarray) -> None:
    texts = [TEXTS[index % 2] for index in range(8)]
    torch.manual_seed(1)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", str(tiny / "clip.safetensors"))
    with torch.no_grad():
        shown = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in images]))
        wanted = model.encode_text(open_clip.get_tokenizer("tiny-clip")(texts))
        expected = 2.5 * torch.nn.functional.cosine_similarity(shown, wanted).numpy()
    values = scorer.score(images, _prompts(texts)).values
    assert values.dtype == np.float32
    assert np.ptp(values) > 1e-3
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_order_does_not_matter(scorer: Scorer, images: np.ndarray) -> None:
    order = np.random.default_rng(1).permutation(8)
    texts = [TEXTS[index % 2] for index in range(8)]
    straight = scorer.score(images, _prompts(texts)).values
    shuffled = scorer.score(images[order], _prompts([texts[index] for index in order])).values
    np.testing.assert_allclose(shuffled, straight[order], atol=1e-6)


def test_a_local_directory_brings_its_weights(
    options: dict[str, Any], tiny: Path, tmp_path: Path, images: np.ndarray
) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    model = f"local-dir:{tmp_path}"
    with pytest.raises(ConfigError, match=r"holds no \.safetensors"):
        build("clip_score", {"model": model})
    (tmp_path / "clip.safetensors").write_bytes((tiny / "clip.safetensors").read_bytes())
    prompts = _prompts([TEXTS[0]] * 8)
    expected = build("clip_score", options).score(images, prompts).values
    np.testing.assert_array_equal(build("clip_score", {"model": model}).score(images, prompts).values, expected)
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="pickle"):
        build("clip_score", {"model": model})


def test_random_depends_on_the_seed_alone(options: dict[str, Any], images: np.ndarray) -> None:
    def values(seed: int) -> np.ndarray:
        scorer = build("clip_score", options | {"pretrained": "random", "seed": seed})
        return scorer.score(images, _prompts([TEXTS[0]] * 8)).values

    first, again, other = values(0), values(0), values(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": "/nowhere/clip.safetensors"}, "/nowhere/clip.safetensors does not exist"),
        ({"pretrained": "laion2b"}, "no pretrained weights laion2b; its tags: none"),
        ({"config": None, "model": "ViT-B-33", "pretrained": "openai"}, "no model ViT-B-33"),
        ({"config": None, "model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, "offline .HF_HUB_OFFLINE.*cache"),
    ],
)
def test_missing_weights(
    options: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        build("clip_score", options | changes)


def test_weights_of_another_model(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text(json.dumps(TINY | {"embed_dim": 48}))
    with pytest.raises(ConfigError, match="cannot load wide"):
        build("clip_score", options | {"config": str(tmp_path / "wide.json")})
