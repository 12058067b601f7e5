"""ReFL: its gradient is that of the learned score of the predicted images, and it leaves the reasoning alone."""

from __future__ import annotations

import pytest
import torch
from chains import changed, make_chains, make_engine, snapshot
from golden_numbers import CHECKPOINT, close

from common.bagel import checkpoint as store
from common.bagel import vae
from common.recipe import validate
from common.shapes.learned import learned_score, load_reader
from common.types import Prompt
from learner.refl import ReFLUpdater
from learner.update import MicroBatch, lay_out

pytestmark = pytest.mark.usefixtures("one_rank")

ASKED = [
    {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "exclude": []},
    {"tag": "counting", "include": [{"class": "ring", "count": 3}], "exclude": [{"class": "object", "count": 4}]},
]


@pytest.fixture
def opened() -> store.Checkpoint:
    return store.load(CHECKPOINT)


@pytest.fixture
def micro(opened: store.Checkpoint) -> MicroBatch:
    chains = make_chains(opened, 4)
    prompts = [Prompt(f"p{i}", "", ASKED[i % 2]) for i in range(4)]
    return lay_out(chains, [0.0] * 4, [1.0, 1.0, 1.0, 0.0], opened, 0, "cpu", prompts)


def updater_of(opened: store.Checkpoint, lr: float) -> ReFLUpdater:
    config = validate(
        {
            "algorithm": "refl",
            "objective": {"text_weight": 0, "image_grad_to_reasoning": False, "regulariser": "none"},
            "rewards": [{"name": "shapes_learned"}],
        }
    )
    return ReFLUpdater(opened, make_engine(opened.policy, lr=lr), None, config, 1e-4, 1)


def test_the_gradient_is_that_of_the_predicted_images_score(opened: store.Checkpoint, micro: MicroBatch) -> None:
    from deepspeed.utils import safe_get_full_grad

    policy, reader = opened.policy, load_reader()
    policy.zero_grad()
    for place in range(3):  # the fourth chain only keeps ranks in step
        chain = make_chains(opened, 4)[place]
        text = opened.chat.context_ids(chain.text.prompt_ids.tolist(), chain.text.ids.tolist())
        image = chain.image
        x_t, t = torch.from_numpy(image.x_t), torch.from_numpy(image.t)
        for k in range(len(t)):
            v = policy.velocity(x_t[[k]], t[[k]], policy.prefill([text]), image.grid)
            pixels = vae.decode(opened.vae, opened.config, x_t[[k]] - t[k] * v, image.grid).clamp(-1, 1)
            (-learned_score(reader, pixels, [ASKED[place % 2]]).sum() / (3 * len(t))).backward()
    groups = {name: dict(pairs) for name, pairs in policy.parameter_groups().items()}
    wanted = {name: p.grad.clone() for name, p in groups["denoising"].items() if p.grad is not None}
    policy.zero_grad()

    updater = updater_of(opened, 0.0)
    found: dict[str, torch.Tensor] = {}
    step = updater._step

    def watched() -> dict[str, float]:
        found.update({n: safe_get_full_grad(p).clone() for group in groups.values() for n, p in group.items()})
        return step()

    updater._step = watched  # type: ignore[method-assign]
    updater.run([[micro]], [3])
    assert wanted
    for name, gradient in wanted.items():
        close(found[name], gradient, atol=2e-4 * gradient.abs().max().item(), rtol=1e-3)
    assert all((found[name] == 0).all() for name in groups["reasoning"])


def test_the_score_rises_and_the_reasoning_stays(opened: store.Checkpoint, micro: MicroBatch) -> None:
    updater, before = updater_of(opened, 1e-3), snapshot(opened.policy)

    def score() -> float:
        with torch.no_grad():
            return updater.predicted_score(micro, opened.policy(micro.packed).velocity)[:3].mean().item()

    first = score()
    for _ in range(5):
        sums = updater.run([[micro]], [3])
    assert score() > first + 1e-4
    assert sums["sum/image/ratio"] == sums["count/window"]
    moved = changed(opened.policy, before)
    assert moved and moved <= {name for name, _ in opened.policy.parameter_groups()["denoising"]}
