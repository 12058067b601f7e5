"""`unigrpo generate`: one prompt, n images with their reasoning, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.config import ConfigError, TrainConfig
from common.runtime import thread_env
from common.types import Group, Prompt, RolloutRequest, chain_seed
from deploy.preflight import check_guidance, check_lengths, local_cpus


def run_generate(config: TrainConfig, prompt: str, number: int, out: Path, seed: int) -> None:
    """Writes image-0.png ... and generated.json (prompt, reasoning, seeds) to `out`; prints the reasoning."""
    from common.policy import outline

    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"reasoner_actor": None})})
    if not prompt.strip():
        raise ConfigError("prompt is empty; say what to draw")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"-o {out} is a file; give a directory")
    model = outline(config.model)
    model.grid(config.model.height, config.model.width)
    asked = Prompt("generate", prompt, {})
    check_guidance(config, model)
    check_lengths(config, model, [asked])
    os.environ.update(thread_env(local_cpus()))
    from rollout.actor import RolloutReplica

    replica = RolloutReplica(config)
    seeds = tuple(chain_seed(seed, 0, 0, k) for k in range(number))
    request = RolloutRequest(asked, 0, seeds, None, config.evaluation.points, config.evaluation.cfg)
    _, group = replica.generate([request])
    assert isinstance(group, Group)
    write_images(group, out)


def write_images(group: Group, out: Path) -> None:
    """PNGs and generated.json of one group, and the reasoning on standard output."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, chain in enumerate(group.chains):
        path = out / f"image-{number}.png"
        Image.fromarray(chain.image.pixels).save(path)
        rows.append({"image": path.name, "reasoning": chain.text.text, "seed": chain.seed})
        print(f"{path}: {chain.text.text}")
    (out / "generated.json").write_text(json.dumps({"prompt": group.prompt.text, "images": rows}, indent=2))
