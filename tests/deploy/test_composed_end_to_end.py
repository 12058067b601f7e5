"""One training step of a composed policy of each pipeline class: Ray actors, vLLM, the SDE, DeepSpeed, new weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray

from common.config import Cfg, ConfigError, Evaluation, Model, TrainConfig, resolve_path
from common.policy import open_policy
from common.prompts import PromptOrder, read_prompts
from common.recipe import validate
from common.types import Group
from deploy.preflight import check_inputs
from deploy.requests import training_requests
from learner import checkpoint as run_checkpoint
from learner.group import LearnerGroup
from rollout.pool import RolloutPool

PROMPTS, CHAINS = 2, 3


def config_of(
    root: Path, family: str, reasoner: str, learner: dict[str, object], rollout: dict[str, object]
) -> TrainConfig:
    return validate(
        {
            "run_name": f"composed-{family}",
            "model": {"path": str(root / reasoner), "pipeline": str(root / family), "system_prompt": "rewrite-think"},
            "data": {"prompts_per_step": PROMPTS, "group_size": CHAINS},
            "sampling": {
                "max_tokens": 12,
                "max_prompt_tokens": 450,
                "points": 5,
                "window_range": [0, 4],
                "window_size": 2,
            },
            "optimizer": {"lr_reasoning": 1e-3, "lr_denoising": 1e-3},
            "rollout": {"replicas": 1, "dtype": "float32", "deadline_s": 250, **rollout},
            "learner": {"ranks": 1, "dtype": "float32", "deadline_s": 250, **learner},
        }
    )


@contextmanager
def learners(config: TrainConfig, resume: Path | None = None) -> Iterator[LearnerGroup]:
    group = LearnerGroup(config, resume)
    try:
        yield group
    finally:
        group.close()


def draw(pool: RolloutPool, config: TrainConfig, step: int) -> tuple[list[ray.ObjectRef], list[Group]]:
    order = PromptOrder(read_prompts(resolve_path(config.data.train)), PROMPTS, 0)
    batch = pool.submit(training_requests(config, order, step))
    assert len(list(batch.arrivals(config.rollout.deadline_s))) == PROMPTS
    return batch.refs, ray.get(batch.refs)


def redness(groups: list[Group]) -> NDArray[np.float64]:
    return np.array([[float(chain.image.pixels[..., 0].mean()) for chain in group.chains] for group in groups])


@pytest.mark.parametrize(
    ("family", "reasoner", "learner", "rollout"),
    [
        ("sd3", "qwen2", {"ranks": 2}, {}),
        ("flux", "llama", {}, {"reasoner_actor": {}, "transport": "collective"}),
        ("qwen_image", "qwen2", {"lora": {"rank": 4}}, {}),
    ],
)
def test_one_training_step(
    local_ray: None,
    tiny_models: Path,
    tmp_path: Path,
    family: str,
    reasoner: str,
    learner: dict[str, object],
    rollout: dict[str, object],
) -> None:
    config = config_of(tiny_models, family, reasoner, learner, rollout)
    assert "transformer." in check_inputs(config).parameters
    guided = config.model_copy(update={"evaluation": Evaluation(cfg=Cfg(text_scale=4))})
    with pytest.raises(ConfigError, match=r"evaluation\.cfg\.text_scale is 4 but .* one branch; give 1"):
        check_inputs(guided)
    pool = RolloutPool(config)
    try:
        with learners(config) as group:
            group.wait_ready()
            pool.wait_ready()
            pool.sync(group.publish())  # refused unless vLLM answers as the published weights do
            refs, groups = draw(pool, config, 0)
            metrics = group.update(0, refs, redness(groups))
            assert metrics["text/ratio_mean"] == metrics["image/ratio_mean"] == 1.0
            assert metrics["image/velocity_mse"] == 0.0
            assert metrics["text/logprob_diff_rollout"] < 1e-5 and metrics["image/velocity_diff_rollout"] < 1e-5
            assert metrics["grad_norm/reasoning"] > 0 and metrics["grad_norm/denoising"] > 0
            publication = group.publish()
            assert publication.manifest.version == 1
            pool.sync(publication)
            group.save(tmp_path / "step-000001", {"step": 1})
            group.saved()
        _, later = draw(pool, config, 0)
    finally:
        pool.close()
    for before, after in zip(groups, later, strict=True):
        assert all(chain.text.version == chain.image.version == 0 for chain in before.chains)
        assert all(chain.text.version == chain.image.version == 1 for chain in after.chains)
        # The same noise under other weights.
        assert all((a.image.v_old != b.image.v_old).any() for a, b in zip(before.chains, after.chains, strict=True))
    check_saved(config, tmp_path / "step-000001")
    if "lora" in learner:
        with learners(config, tmp_path / "step-000001") as resumed:
            assert resumed.wait_ready() == 1
            assert resumed.publish().manifest.checksum == publication.manifest.checksum


def check_saved(config: TrainConfig, checkpoint: Path) -> None:
    """The checkpoint is a policy like any other; with adapters exactly the layers that have one are other than they
    were, without them every half."""
    run_checkpoint.verify(checkpoint)
    before = open_policy(config.model, frozen=None).policy.state_dict()
    after = open_policy(Model(path=str(checkpoint / "policy")), frozen=None).policy.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    halves = {name.partition(".")[0] for name in changed}
    assert halves == {"reasoner", "transformer"}
    if lora := config.learner.lora:
        assert all(name.removesuffix(".weight").endswith(lora.target_modules) for name in changed)
        assert all((name.startswith("master.") and "lora_" in name) or not name.startswith("master.")
                   for name in run_checkpoint.read_optimizer(checkpoint))  # fmt: skip
