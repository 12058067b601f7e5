"""Guidance against the reference: every renormalisation, an empty context, the interval, and the chat's branches."""

from __future__ import annotations

import json

import pytest
import torch
from golden_numbers import COMBINED, GOLDEN, close, golden, meaning, settings, tensor

from common.bagel.cfg import Branches, combine, guided_velocity
from common.bagel.checkpoint import Checkpoint
from common.config import Cfg

EVERYWHERE = (0.0, 1.0)
COMBINATIONS = [
    name for name in golden("bagel/velocity.npz") if name.startswith("cfg_") and settings("bagel/velocity.npz", name)
]


def cfg_of(name: str) -> Cfg:
    """The settings a recorded velocity was made with."""
    recorded = settings("bagel/velocity.npz", name)
    return Cfg(
        text_scale=recorded["cfg_text_scale"],
        image_scale=recorded["cfg_img_scale"],
        renorm=recorded["cfg_renorm_type"],
        renorm_min=recorded["cfg_renorm_min"],
        interval=EVERYWHERE,
    )


def recorded_ids() -> tuple[list[int], list[int], list[int]]:
    """System prompt, prompt and reasoning, each wrapped."""
    numbers = golden("bagel/velocity.npz")
    return tuple(numbers[f"ctx_{part}_ids"].tolist() for part in ("system", "prompt", "think"))  # type: ignore[return-value]


def test_the_recording_has_every_renormalisation() -> None:
    assert {cfg_of(name).renorm for name in COMBINATIONS} == {"global", "channel", "text_channel"}


@pytest.mark.parametrize("name", COMBINATIONS)
@torch.no_grad()
def test_recorded_combinations(golden_checkpoint: Checkpoint, name: str) -> None:
    numbers, cfg, policy = golden("bagel/velocity.npz"), cfg_of(name), golden_checkpoint.policy
    v, v_text, v_image = (tensor(numbers[f"cfg_v_{branch}"])[None] for branch in ("cond", "text", "img"))
    close(combine(v, v_text, v_image, cfg)[0], numbers[name], atol=COMBINED)

    system, prompt, think = recorded_ids()
    branches = Branches.prefill(policy, [system + prompt + think], [system], [system + prompt], cfg)
    for context, branch in ((branches.text, "text"), (branches.image, "img")):
        if context is not None:
            assert context.position.tolist() == numbers[f"cfg_{branch}_query_position"].tolist()
            assert context.present.sum().item() == numbers[f"cfg_{branch}_ctx_len"]
    grid = tuple(numbers["s0_grid_hw"].tolist())
    found = guided_velocity(policy, tensor(numbers["cfg_x"])[None], tensor(numbers["ts"][[1]]), branches, grid, cfg)
    close(found[0], numbers[name], atol=COMBINED)


@torch.no_grad()
def test_an_empty_context_has_rope_zero(golden_checkpoint: Checkpoint) -> None:
    """Without a system prompt nothing is left when the prompt goes; beside a chain that has one, too."""
    numbers, policy = golden("bagel/velocity.npz"), golden_checkpoint.policy
    scale = float(meaning("bagel/velocity.npz", "nothink_cfg4_v").split("cfg_text_scale=")[1].split(",")[0])
    cfg = Cfg(text_scale=scale, interval=EVERYWHERE)
    system, prompt, think = recorded_ids()
    x, t = tensor(numbers["cfg_x"])[None], tensor(numbers["ts"][[1]])
    grid = tuple(numbers["s0_grid_hw"].tolist())
    alone = Branches.prefill(policy, [prompt], [[]], [prompt], cfg)
    assert alone.text.position.tolist() == [0]
    close(guided_velocity(policy, x, t, alone, grid, cfg)[0], numbers["nothink_cfg4_v"], atol=COMBINED)
    both = Branches.prefill(policy, [system + prompt + think, prompt], [system, []], [[], []], cfg)
    found = guided_velocity(policy, x.expand(2, -1, -1), t.expand(2), both, grid, cfg)
    close(found[1], numbers["nothink_cfg4_v"], atol=COMBINED)
    close(found[0], numbers["cfg_text4_global_v"], atol=COMBINED)


@torch.no_grad()
def test_the_interval_is_open_below_and_closed_above(golden_checkpoint: Checkpoint) -> None:
    numbers, policy = golden("bagel/velocity.npz"), golden_checkpoint.policy
    system, prompt, _ = recorded_ids()
    cfg = Cfg(text_scale=4.0, interval=(0.25, 0.75))
    branches = Branches.prefill(policy, [system + prompt] * 4, [system] * 4, [prompt] * 4, cfg)
    x, t = tensor(numbers["cfg_x"]).expand(4, -1, -1), torch.tensor([0.25, 0.5, 0.75, 0.8])
    grid = tuple(numbers["s0_grid_hw"].tolist())
    plain = policy.velocity(x, t, branches.full, grid)
    moved = (guided_velocity(policy, x, t, branches, grid, cfg) - plain).abs().amax((1, 2)) > 1e-3
    assert moved.tolist() == [False, True, True, False]


def test_norms_are_each_images_own() -> None:
    """Beside an image of another size of velocity, and never longer than without guidance."""
    generator = torch.Generator().manual_seed(0)
    v, v_text, v_image = torch.randn(3, 2, 5, 4, generator=generator) * torch.tensor([1.0, 50.0])[:, None, None]
    for renorm in ("global", "channel", "text_channel"):
        cfg = Cfg(text_scale=4.0, image_scale=1.5, renorm=renorm)
        together = combine(v, v_text, v_image, cfg)
        alone = torch.cat([combine(v[i : i + 1], v_text[i : i + 1], v_image[i : i + 1], cfg) for i in range(2)])
        close(together, alone, atol=1e-5)
        if renorm != "text_channel":
            assert (together.flatten(1).norm(dim=1) <= v.flatten(1).norm(dim=1) * (1 + 1e-5)).all()


def test_what_the_branches_leave_out(golden_checkpoint: Checkpoint) -> None:
    texts, chat = json.loads((GOLDEN / "README.json").read_text())["texts"], golden_checkpoint.chat
    system, prompt, _ = recorded_ids()
    assert chat.cfg_ids(texts["prompt"], texts["system"]) == (system, system + prompt)
    assert chat.cfg_ids(texts["prompt"]) == ([], prompt)
