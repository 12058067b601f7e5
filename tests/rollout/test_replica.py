"""A replica that draws without reasoning, and the noise that a group's chains may share."""

from __future__ import annotations

import numpy as np
import pytest
from golden_numbers import CHECKPOINT

from common.prompts import PromptOrder
from common.recipe import validate
from common.types import Group, Prompt
from deploy.requests import training_requests
from rollout.actor import RolloutReplica

PROMPTS = [Prompt(str(i), text, {}) for i, text in enumerate(("a red ring", "two stars", "a blue square"))]


def settings(**sampling: object) -> dict[str, object]:
    return {
        "model": {"path": str(CHECKPOINT), "height": 16, "width": 16},
        "data": {"prompts_per_step": 2, "group_size": 3},
        "sampling": {"think": False, "points": 9, "window_range": [0, 6], **sampling},
        "objective": {"text_weight": 0.0},
    }


@pytest.mark.parametrize("shared_noise", [False, True])
def test_drawing_without_reasoning(shared_noise: bool) -> None:
    """No vLLM, no token: the image is conditioned on the wrapped prompt alone."""
    config = validate(settings(shared_noise=shared_noise, window_range=[0, 3]))
    replica = RolloutReplica(config)
    assert replica.reasoner is None
    _, *groups = replica.generate(training_requests(config, PromptOrder(PROMPTS, 2, 0), 0))
    for group in groups:
        assert isinstance(group, Group)
        for chain in group.chains:
            assert (len(chain.text.ids), len(chain.text.logprobs), chain.text.text) == (0, 0, "")
            assert chain.text.prompt_ids.tolist() == replica.checkpoint.chat.prompt_ids(group.prompt.text)[:-1]
        starts = [chain.image.x_t[0] for chain in group.chains]
        assert all((start == starts[0]).all() == shared_noise for start in starts[1:])
        after = [chain.image.x_next[0] for chain in group.chains]
        assert len({tuple(x.flatten()[:4].tolist()) for x in after}) == 3, "the window's noise is each chain's own"
    first, second = (group.chains[0].image for group in groups if isinstance(group, Group))
    assert (first.x_t[0] != second.x_t[0]).mean() > 0.99


def test_window_schedules() -> None:
    order = PromptOrder(PROMPTS, 2, 0)

    def firsts(steps: range, **sampling: object) -> np.ndarray:
        config = validate(settings(**sampling))
        return np.array([[r.window[0] for r in training_requests(config, order, s) if r.window] for s in steps])

    group, step = (firsts(range(60), window_schedule=name) for name in ("group", "step"))
    assert (group[:, 0] != group[:, 1]).any()
    assert (step[:, 0] == step[:, 1]).all()
    assert set(step[:, 0]) == set(group.flatten()) == {0, 1, 2, 3}
    sliding = firsts(range(0, 25, 5), window_schedule="progressive", window_interval=5)
    assert sliding.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [3, 3]]
