"""The baselines' recipes: each trains the half that it names and leaves the other as it was."""

from __future__ import annotations

import pytest
from chains import changed, make_chains, snapshot
from golden_numbers import CHECKPOINT

from common.bagel import checkpoint as store
from common.recipe import load_config
from common.types import Prompt
from learner.engine import Engine
from learner.refl import ReFLUpdater
from learner.update import Updater, lay_out

pytestmark = pytest.mark.usefixtures("one_rank")

ASKED = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "exclude": []}


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        ("shapes", {"reasoning", "denoising"}),
        ("textgrpo", {"reasoning"}),
        ("flowgrpo-think", {"denoising"}),
        ("refl-think", {"denoising"}),
    ],
)
def test_a_baseline_trains_its_half_alone(recipe: str, trained: set[str]) -> None:
    config, opened = load_config(recipe), store.load(CHECKPOINT)
    policy = opened.policy
    groups = policy.parameter_groups()
    rates = {"reasoning": config.optimizer.lr_reasoning, "denoising": config.optimizer.lr_denoising}
    engine = Engine(
        policy,
        {name: ([p for _, p in pairs], rates[name]) for name, pairs in groups.items()},
        zero_stage=2,
        dtype="float32",
        betas=(0.9, 0.999),
        weight_decay=0.0,
        grad_clip=1.0,
    )
    parts = engine, None, config, 1e-4, 1
    updater = ReFLUpdater(opened, *parts) if config.algorithm == "refl" else Updater(*parts)
    prompts = [Prompt(str(k), "", ASKED) for k in range(4)]
    micro = lay_out(make_chains(opened, 4), [1.0, -1.0, 0.5, -0.5], [1.0] * 4, opened, 0, "cpu", prompts=prompts)
    before = snapshot(policy)
    updater.run([[micro]], [4])
    moved = changed(policy, before)
    assert {name for name, pairs in groups.items() if moved & {n for n, _ in pairs}} == trained
