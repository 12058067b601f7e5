"""`unigrpo generate` and `unigrpo answer`: one prompt, n images with their reasoning, or one answer about an image; in
this process."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.composed.source import composed_source
from common.config import ConfigError, TrainConfig, resolve_path
from common.prompts import check_characters
from common.rundir import make_directory
from common.runtime import thread_env
from common.types import Group, Prompt, RolloutRequest, chain_seed
from deploy.preflight import check_guidance, check_lengths, check_size, local_cpus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from common.bagel.checkpoint import Checkpoint


@dataclass(frozen=True)
class Drawn:
    """pixels [H, W, 3]."""

    pixels: NDArray[np.uint8]
    reasoning: str
    seed: int


def run_generate(
    config: TrainConfig, prompt: str, number: int, out: Path, seed: int, image: Path | None = None
) -> None:
    """Writes image-0.png ... and generated.json (prompt, reasoning, seeds) to `out`; prints the reasoning. image: an
    image to change; without, new ones are drawn."""
    if not prompt.strip():
        raise ConfigError("prompt is empty; say what to draw")
    check_characters(prompt, "prompt")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"-o {out} is a file; give a directory")
    make_directory(out, "-o")
    seeds = tuple(chain_seed(seed, 0, 0, k) for k in range(number))
    drawn = _edit(config, prompt, image, seeds) if image else _draw(config, prompt, seeds)
    write_images(prompt, drawn, out)


def run_answer(config: TrainConfig, question: str, image: Path) -> str:
    """The likeliest answer to a question about an image, of sampling.max_tokens at most."""
    if not question.strip():
        raise ConfigError("question is empty; ask something")
    check_characters(question, "question")
    pixels, checkpoint = read_image(image), _seeing(config)
    from common.bagel import seeing

    return seeing.answer(checkpoint, pixels, question, config.sampling.max_tokens)


def _draw(config: TrainConfig, prompt: str, seeds: tuple[int, ...]) -> list[Drawn]:
    from common.policy import outline

    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"reasoner_actor": None})})
    model = outline(config.model)
    check_size(config, model)
    asked = Prompt("generate", prompt, {})
    check_guidance(config, model)
    check_lengths(config, model, [asked])
    os.environ.update(thread_env(local_cpus()))
    from rollout.actor import RolloutReplica

    replica = RolloutReplica(config)
    request = RolloutRequest(asked, 0, seeds, None, config.evaluation.points, config.evaluation.cfg)
    try:
        _, group = replica.generate([request])
    finally:
        replica.close()
    assert isinstance(group, Group)
    return [Drawn(chain.image.pixels, chain.text.text, chain.seed) for chain in group.chains]


def _edit(config: TrainConfig, instruction: str, image: Path, seeds: tuple[int, ...]) -> list[Drawn]:
    pixels, checkpoint = read_image(image), _seeing(config)
    from common.bagel import seeing

    return [Drawn(*seeing.edit(checkpoint, pixels, instruction, config, seed), seed) for seed in seeds]


def _seeing(config: TrainConfig) -> Checkpoint:
    """The policy with its understanding tower. ConfigError if it has none."""
    if composed_source(config.model):
        raise ConfigError(f"{config.model.path} is drawn by a pipeline, from text alone; images are read by BAGEL")
    os.environ.update(thread_env(local_cpus()))
    import torch

    from common.bagel import checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.rollout.dtype)
    return checkpoint.load(resolve_path(config.model.path), dtype, device, understanding=True)


def read_image(path: Path) -> NDArray[np.uint8]:
    """RGB [H, W, 3]. ConfigError if it is missing or not an image."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return np.array(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"image {path} cannot be read ({error}); give a PNG or JPEG file") from error


def write_images(prompt: str, drawn: list[Drawn], out: Path) -> None:
    """PNGs and generated.json, and the reasoning on standard output."""
    from PIL import Image

    rows = []
    for number, image in enumerate(drawn):
        path = out / f"image-{number}.png"
        Image.fromarray(image.pixels).save(path)
        rows.append({"image": path.name, "reasoning": image.reasoning, "seed": image.seed})
        print(f"{path}: {image.reasoning}")
    (out / "generated.json").write_text(json.dumps({"prompt": prompt, "images": rows}, indent=2))
