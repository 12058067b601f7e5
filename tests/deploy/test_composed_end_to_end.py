"""One training step of a composed policy of each pipeline class: Ray actors, vLLM, the SDE, DeepSpeed, new weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from common.config import Cfg, ConfigError, Evaluation, Model, TrainConfig, resolve_path
from common.policy import open_policy
from common.prompts import PromptOrder, read_prompts
from common.recipe import to_yaml, validate
from common.rundir import RunDirectory
from common.runtime import thread_env
from common.types import Group
from deploy.cli import app
from deploy.export import export
from deploy.preflight import check_inputs
from deploy.requests import training_requests
from learner import checkpoint as run_checkpoint
from learner.group import LearnerGroup
from rollout.pool import RolloutPool
from rollout.reasoner import Reasoner

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
    monkeypatch: pytest.MonkeyPatch,
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
    run = RunDirectory(tmp_path / "run").create(to_yaml(config))
    pool = RolloutPool(config)
    try:
        with learners(config) as group:
            group.wait_ready()
            pool.wait_ready()
            first = group.publish()
            pool.sync(first)  # refused unless vLLM answers as the published weights do
            refs, groups = draw(pool, config, 0)
            metrics = group.update(0, refs, redness(groups))
            assert metrics["text/ratio_mean"] == metrics["image/ratio_mean"] == 1.0
            assert metrics["image/velocity_mse"] == 0.0
            assert metrics["text/logprob_diff_rollout"] < 1e-5 and metrics["image/velocity_diff_rollout"] < 1e-5
            assert metrics["grad_norm/reasoning"] > 0 and metrics["grad_norm/denoising"] > 0
            publication = group.publish()
            assert publication.manifest.version == 1
            sent = [publication.manifest.buckets[i] for i in publication.manifest.changed_since(first.manifest)]
            assert all(".lora_" in name for bucket in sent for name in bucket.names) == ("lora" in learner)
            pool.sync(publication)
            group.save(run.checkpoint(1), {"step": 1})
            group.saved()
        _, later = draw(pool, config, 0)
    finally:
        pool.close()
    for before, after in zip(groups, later, strict=True):
        assert all(chain.text.version == chain.image.version == 0 for chain in before.chains)
        assert all(chain.text.version == chain.image.version == 1 for chain in after.chains)
        # The same noise under other weights.
        assert all((a.image.v_old != b.image.v_old).any() for a, b in zip(before.chains, after.chains, strict=True))
    check_saved(config, run.checkpoint(1))
    if "lora" in learner:
        with learners(config, run.checkpoint(1)) as resumed:
            assert resumed.wait_ready() == 1
            assert resumed.publish().manifest.checksum == publication.manifest.checksum
        for name, value in thread_env(1).items():
            monkeypatch.setenv(name, value)  # and put back afterwards
        check_exported(config, export(run, tmp_path / "exported"), run.checkpoint(1) / "policy")


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


@torch.no_grad()
def check_exported(config: TrainConfig, out: Path, trained: Path) -> None:
    """A pipeline of diffusers, a language model of transformers and vLLM, adapters merged, and a policy to generate
    with."""
    opened = open_policy(Model(path=str(trained)))
    policy, pipeline = opened.policy, DiffusionPipeline.from_pretrained(out / "pipeline")
    reasoner = AutoModelForCausalLM.from_pretrained(out / "reasoner")
    for found, wanted in ((pipeline.transformer, policy.transformer), (reasoner, policy.reasoner)):
        weights = wanted.state_dict()
        assert found.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())
    drawn = pipeline("a ring", height=64, width=64, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3) and np.isfinite(drawn).all()
    ids = opened.chat.prompt_ids("a ring beside a cross")
    engine = Reasoner(out / "reasoner", eos_token_id=opened.chat.ends, max_model_len=len(ids) + 2, max_batch=2)
    try:
        assert torch.tensor(engine.probe(ids)).allclose(policy.token_logprobs([ids])[0], atol=1e-5)
    finally:
        engine.close()
    (recipe := out.with_name("recipe.yaml")).write_text(to_yaml(config))
    command = ["generate", str(out), "a ring", "-n", "1", "--recipe", str(recipe), "-o", str(out / "drawn")]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert Image.open(out / "drawn" / "image-0.png").size == (config.model.width, config.model.height)
