"""What is found wrong before anything starts, and what a step's requests depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden_numbers import CHECKPOINT

from common.checkpoint_files import CheckpointError
from common.config import ConfigError, TrainConfig
from common.prompts import PromptOrder, read_prompts
from common.recipe import validate
from common.types import RolloutRequest
from deploy.preflight import check_fits, check_inputs, check_resources, demands, describe
from deploy.requests import evaluation_requests, training_requests

TRAIN = Path(__file__).parents[2] / "common/shapes/data/train.jsonl"


def config_with(**data: Any) -> TrainConfig:
    return validate({"model": {"path": str(CHECKPOINT)}, **data})


def test_too_few_cpus() -> None:
    config = config_with(rollout={"replicas": 4, "cpus": 1.0}, learner={"ranks": 2, "cpus": 1.5})
    needed = sum(demand.count * demand.given.cpus for demand in demands(config))
    check_resources(demands(config), {"CPU": needed})
    with pytest.raises(ConfigError) as error:
        check_resources(demands(config), {"CPU": needed - 1})
    for word in (f"ask for {needed:g} CPUs", "rollout 4 x 1", "learner 2 x 1.5", f"has {needed - 1:g}", "lower"):
        assert word in str(error.value)


def test_no_gpu_where_one_is_asked_for() -> None:
    config = config_with(rollout={"gpus": 1, "tensor_parallel": 2, "replicas": 1})
    with pytest.raises(ConfigError, match=r"ask for 2 GPUs \(rollout 1 x 2.*the cluster has 0"):
        check_resources(demands(config), {"CPU": 100.0})
    check_resources(demands(config), {"CPU": 100.0, "GPU": 2.0})


def test_fewer_replicas_than_the_recipe_has_may_have_been_asked_for() -> None:
    config = config_with(rollout={"replicas": 4})
    for asked, counted in ((None, 4), (2, 2), (9, 4)):
        assert demands(config, replicas=asked)[0].count == counted


def test_an_actor_larger_than_any_node() -> None:
    config = config_with(learner={"cpus": 3}, rollout={"cpus": 1, "custom": {"rollout_node": 1}})
    nodes = [{"CPU": 2.0, "rollout_node": 1000.0}, {"CPU": 4.0}]
    check_fits(demands(config), nodes)
    with pytest.raises(
        ConfigError, match=r"one learner actor asks for 3 CPUs, but no node has .*nodes: 2 CPUs\); lower"
    ):
        check_fits(demands(config), nodes[:1])
    with pytest.raises(
        ConfigError, match=r"one rollout actor asks for 1 CPUs, 1 rollout_node, .*4 CPUs, 0 rollout_node"
    ):
        check_fits(demands(config), nodes[1:])


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        check_inputs(config_with(model={"path": "nowhere"}))
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        check_inputs(config_with(model={"path": str(tmp_path)}))


def test_image_that_does_not_fit_the_model() -> None:
    with pytest.raises(ConfigError, match=r"model.height x model.width: image size 33x32 is not a multiple"):
        check_inputs(config_with(model={"path": str(CHECKPOINT), "height": 33, "width": 32}))


def test_a_clip_that_fp32_cannot_tell_from_a_ratio_of_one() -> None:
    with pytest.raises(ConfigError, match=r"objective.image_clip is 1e-08, .* less than fp32 can tell .* give a"):
        check_inputs(config_with(objective={"image_clip": 1e-8}))

    check_inputs(config_with(objective={"image_clip": 1e-8, "image_trust": "kl"}))


def test_guidance_at_times_that_no_step_begins_at() -> None:
    late = {"text_scale": 4.0, "interval": (0.0, 0.1)}
    both = {"sampling": {"cfg": late}, "evaluation": {"cfg": late}}
    with pytest.raises(
        ConfigError, match=r"sampling.cfg.interval is \[0, 0.1\], but no step .*at 0.25\); widen it, or"
    ):
        check_inputs(config_with(**both))
    check_inputs(
        config_with(**both | {"sampling": {"cfg": late, "points": 41}, "evaluation": {"cfg": late, "points": 41}})
    )
    with pytest.raises(
        ConfigError, match=r"evaluation.cfg.interval is .* of evaluation.points 21 and sampling.shift 3"
    ):
        check_inputs(config_with(sampling={"points": 41}, evaluation={"cfg": late}))


def test_times_that_fp32_cannot_tell_apart() -> None:
    with pytest.raises(ConfigError, match=r"sampling.shift is 1e\+09, .* one number in fp32; take a shift nearer to 1"):
        check_inputs(config_with(sampling={"shift": 1e9}))


def test_more_prompts_per_step_than_there_are(tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(ConfigError, match=r"data.prompts_per_step is 8 but .*few.jsonl has 3 prompts"):
        check_inputs(config_with(model={"path": str(CHECKPOINT), "height": 32, "width": 32}, data={"train": str(few)}))


def test_an_evaluation_needs_no_training_prompts(tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:3]))
    for train in (few, tmp_path / "none.jsonl"):
        inputs = check_inputs(config_with(steps=0, data={"train": str(train), "heldout": str(few)}))
        assert inputs.train == [] and len(inputs.heldout) == 3


def test_description_says_the_arithmetic() -> None:
    text = describe(config_with(data={"prompts_per_step": 4, "group_size": 6}, objective={"epochs": 2}))
    assert "4 prompts x 6 chains = 24 chains per step" in text
    assert "2 epochs x 1 minibatches = 2 optimizer steps per step" in text
    assert "11 time points = 10 denoising steps, 3 of them trained, first of them 0..2" in text


@pytest.fixture(scope="module")
def order() -> PromptOrder:
    return PromptOrder(read_prompts(TRAIN)[:40], 8, seed=0)


def test_requests_of_a_step_depend_on_the_step_alone(order: PromptOrder) -> None:
    config = config_with()
    steps = [training_requests(config, order, step) for step in range(6)]
    assert training_requests(config, order, 3) == steps[3]
    assert [request.prompt for request in steps[2]] == order.batch(2)


def test_seeds_are_unique_and_windows_are_drawn_per_group(order: PromptOrder) -> None:
    """A window that a seed of the run or of the rank fixes would train three steps for ever."""
    config = config_with()
    requests: list[RolloutRequest] = [r for step in range(30) for r in training_requests(config, order, step)]
    evaluation = evaluation_requests(config, order.prompts)
    seeds = [seed for request in [*requests, *evaluation] for seed in request.seeds]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    windows = [request.window for request in requests]
    assert set(windows) == {(0, 3), (1, 3), (2, 3)}
    assert min(windows.count(window) for window in set(windows)) > len(windows) / 5
    assert any(len({r.window for r in training_requests(config, order, step)}) > 1 for step in range(3))
    assert {request.window for request in evaluation} == {None}
    assert {request.points for request in evaluation} == {config.evaluation.points}


def test_another_seed_gives_another_run(order: PromptOrder) -> None:
    one, other = (training_requests(config_with(seed=seed), order, 0) for seed in (0, 1))
    assert not {s for r in one for s in r.seeds} & {s for r in other for s in r.seeds}
    # Evaluation is the same for every run, so that checkpoints can be compared.
    assert evaluation_requests(config_with(seed=0), order.prompts) == evaluation_requests(
        config_with(seed=1), order.prompts
    )


def test_guidance_of_training_and_of_evaluation_are_two_settings(order: PromptOrder) -> None:
    config = config_with(evaluation={"cfg": {"text_scale": 4.0}})
    assert {request.cfg for request in evaluation_requests(config, order.prompts)} == {config.evaluation.cfg}
    assert not any(request.cfg and request.cfg.enabled for request in training_requests(config, order, 0))
    guided = config_with(evaluation={"cfg": {"text_scale": 2.0}}, sampling={"cfg": {"text_scale": 2.0}})
    assert {request.cfg for request in training_requests(guided, order, 0)} == {guided.sampling.cfg}


def test_what_is_frozen_is_checked_and_shown() -> None:
    assert "denoising, learning rate" in check_inputs(config_with()).parameters
    with pytest.raises(ConfigError, match=r"optimizer.frozen names 'embeding', which is neither a group"):
        check_inputs(config_with(optimizer={"frozen": ["embeding"]}))
    group = {"name": "a", "lr": 1e-6}
    named = {"groups": [group | {"pattern": "*embed_tokens*"}]}
    assert "  a, learning rate 1e-06: " in check_inputs(config_with(optimizer=named)).parameters
    with pytest.raises(ConfigError, match=r"groups\.0\.pattern is '\*embed_tokens\*', which fits no parameter"):
        check_inputs(config_with(optimizer=named, learner={"lora": {}}))
    nothing = {"frozen": ["reasoning"]}
    with pytest.raises(ConfigError, match=r"objective.text_weight is 1 but nothing that it reaches is trained"):
        check_inputs(config_with(optimizer=nothing))
    check_inputs(config_with(optimizer=nothing, steps=0))
