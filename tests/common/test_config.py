"""The configuration: what is wrong is said with field, value and remedy, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import hardware
from common.config import REPOSITORY, ConfigError, Optimizer, TrainConfig, resolve_path
from common.recipe import RECIPES, apply_overrides, load_config, read_recipe, to_yaml, validate


def error_of(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        validate(data)
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stepps": 3}, ["stepps is not a known key", "did you mean steps?"]),
        ({"sampling": {"temprature": 1}}, ["sampling.temprature", "did you mean temperature?"]),
        ({"rewards": [{"name": "shapes", "wieght": 1}]}, ["rewards.0.wieght", "did you mean weight?"]),
        ({"checkpoints": {"zzz": 1}}, ["checkpoints.zzz", "known keys here: every, keep"]),
    ],
)
def test_unknown_keys_are_named_with_the_closest_known_one(data: dict[str, Any], words: list[str]) -> None:
    message = error_of(data)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"data": {"prompts_per_step": 7}, "learner": {"ranks": 2}},
            ["data.prompts_per_step is 7", "2 learner ranks", "use a multiple of 2"],
        ),
        (
            {"data": {"prompts_per_step": 8}, "learner": {"ranks": 2}, "objective": {"minibatches": 3}},
            ["data.prompts_per_step is 8", "3 minibatches", "use a multiple of 6"],
        ),
        (
            {"sampling": {"window_size": 4, "window_range": [1, 4]}},
            ["sampling.window_size is 4", "[1, 4] holds 3 steps", "make the window smaller"],
        ),
        (
            {"sampling": {"points": 5, "window_range": [0, 5]}},
            ["window_range ends at step 5", "5 points are 4 steps", "raise sampling.points"],
        ),
        ({"sampling": {"window_range": [3, 3]}}, ["sampling.window_range is [3, 3]", "low < high"]),
        ({"sampling": {"window_range": [-1, 3]}}, ["sampling.window_range is [-1, 3]", "0 <= low"]),
        ({"rewards": [{"name": "a"}, {"name": "a"}]}, ["rewards names a scorer twice", "give each one entry"]),
        (
            {"objective": {"text_weight": 0, "image_weight": 0}},
            ["objective.text_weight and objective.image_weight are both 0", "nothing would be trained"],
        ),
        (
            {"algorithm": "refl", "rewards": [{"name": "shapes_learned"}]},
            ["objective.text_weight is 1", "refl leaves the text alone"],
        ),
        (
            {"algorithm": "refl", "objective": {"text_weight": 0}},
            ["rewards has no shapes_learned", "add it"],
        ),
        (
            {
                "algorithm": "refl",
                "objective": {"text_weight": 0},
                "rewards": [{"name": "shapes_learned", "weight": 0}, {"name": "shapes"}],
            },
            ["rewards has no shapes_learned of a weight above 0", "add it"],
        ),
        (
            {"learner": {"ranks": 2, "gpus": 0.49}},
            ["learner.gpus is 0.49 but learner.ranks is 2", "give more than 0.5"],
        ),
        (
            {"optimizer": {"lr_reasoning": 0, "lr_denoising": 0}},
            ["objective.text_weight is 1 but nothing that it reaches is trained (reasoning:", "set the weight to 0"],
        ),
        (
            {"optimizer": {"frozen": ["denoising"]}, "objective": {"image_grad_to_reasoning": False}},
            ["objective.image_weight is 1 but nothing that it reaches is trained (denoising:"],
        ),
        (
            {
                "algorithm": "refl",
                "objective": {"text_weight": 0},
                "rewards": [{"name": "shapes_learned", "weight": -1}, {"name": "shapes"}],
            },
            ["rewards has no shapes_learned of a weight above 0", "add it"],
        ),
        (
            {
                "algorithm": "refl",
                "objective": {"text_weight": 0},
                "rewards": [{"name": "shapes_learned"}],
                "data": {"refill_rounds": 2},
            },
            ["data.refill_rounds is 2 but algorithm refl", "set it to 0"],
        ),
        (
            {"rewards": [{"name": "shapes", "weight": 0}, {"name": "clip_score", "weight": 0}]},
            ["no scorer with a weight other than 0 (shapes, clip_score)", "give one one"],
        ),
        (
            {"sampling": {"window_size": 1}, "objective": {"image_reweight": True}},
            ["image_reweight is true but sampling.window_size is 1", "make the window larger"],
        ),
        (
            {
                "sampling": {"think": False, "cfg": {"text_scale": 2, "image_scale": 2}},
                "evaluation": {"cfg": {"text_scale": 2, "image_scale": 2}},
                "objective": {"text_weight": 0},
            },
            ["sampling.cfg.image_scale is 2 but sampling.think is false", "set the scale to 1"],
        ),
        (
            {"sampling": {"noise_level": 0}, "objective": {"image_weight": 0, "regulariser": "latent_kl"}},
            ["sampling.noise_level is 0 but objective.regulariser is latent_kl", "velocity_mse"],
        ),
        (
            {"sampling": {"cfg": {"text_scale": 4}}, "evaluation": {"cfg": {"text_scale": 2}}},
            ["sampling.cfg.text_scale is 4.0 but evaluation.cfg.text_scale is 2.0", "one value"],
        ),
        (
            {"sampling": {"think": False}},
            ["sampling.think is false but objective.text_weight is 1", "text_kl is 0", "set both to 0"],
        ),
        (
            {"sampling": {"points": 2, "window_range": [0, 1], "window_size": 1}},
            ["sampling.points is 2", "a single step leaves nothing to explore"],
        ),
        (
            {"rollout": {"replicas": 2, "max_replicas": 1}},
            ["rollout.replicas is 2, outside min_replicas 2 and max_replicas 1"],
        ),
        (
            {"learner": {"zero_stage": 3, "activation_checkpointing": True}},
            ["learner.zero_stage is 3 but learner.activation_checkpointing", "take stage 2"],
        ),
        (
            {"learner": {"zero_stage": 3, "reference_on_host": True}},
            ["learner.zero_stage is 3 but learner.reference_on_host", "take stage 2"],
        ),
        (
            {"rollout": {"tensor_parallel": 2}},
            ["rollout.tensor_parallel is 2 but rollout.gpus is 0", "give 1, or tensor_parallel=1"],
        ),
        (
            {"rollout": {"tensor_parallel": 2, "gpus": 1, "reasoner_actor": {"gpus": 0.5}}},
            ["rollout.tensor_parallel is 2 but rollout.reasoner_actor.gpus is 0.5"],
        ),
        (
            {"sampling": {"noise_level": 0}},
            ["sampling.noise_level is 0 but objective.image_weight is 1", "raise the noise"],
        ),
        (
            {"sampling": {"noise_level": 1e-8}},
            ["sampling.noise_level is 1e-08", "fp32 cannot tell", "give at least 0.0001, or 0 for none"],
        ),
        (
            {"objective": {"text_importance_cap": 0.5}},
            ["objective.text_importance_cap is 0.5", "give at least 1 (2 is usual), or 0 for none"],
        ),
        (
            {"sampling": {"sampler": "flow_cps", "points": 6, "window_range": [1, 5]}},
            ["window_range ends at step 5, the last one", "flow_cps adds no noise", "end it earlier"],
        ),
        (
            {"sampling": {"sampler": "flow_cps", "noise_level": 1.5}},
            ["sampling.noise_level is 1.5", "flow_cps knows levels from 0 to 1"],
        ),
        (
            {"sampling": {"cfg": {"text_scale": 4}}},
            ["sampling.cfg.text_scale is 4 but evaluation.cfg.text_scale is 1", "give evaluation.cfg the same scales"],
        ),
        (
            {"evaluation": {"cfg": {"image_scale": 2}}},
            ["evaluation.cfg.image_scale is 2 but evaluation.cfg.text_scale is 1", "no guidance"],
        ),
        (
            {"sampling": {"cfg": {"interval": [0.5, 0.2]}}},
            ["sampling.cfg.interval is [0.5, 0.2]", "low < high"],
        ),
        (
            {"rollout": {"gpus": 1, "reasoner_actor": {}}},
            ["rollout.gpus is 1 but rollout.reasoner_actor.gpus is 0", "both on GPUs or both on CPUs"],
        ),
        (
            {"sampling": {"think": False}, "objective": {"text_weight": 0}, "rollout": {"reasoner_actor": {}}},
            ["rollout.reasoner_actor is set but sampling.think is false", "remove it"],
        ),
        (
            {"objective": {"epochs": 2}, "max_staleness": 1},
            ["objective.epochs is 2 but max_staleness is 1", "old means of stale chains", "max_staleness to 0"],
        ),
        (
            {"optimizer": {"groups": [{"name": n, "pattern": "*", "lr": 0} for n in ("a", "a")]}},
            ["optimizer.groups.1.name is 'a'", "give each its own"],
        ),
        (
            {"optimizer": {"groups": [{"name": "denoising", "pattern": "*", "lr": 0}]}},
            ["optimizer.groups.0.name is 'denoising'", "another group of parameters has already"],
        ),
    ],
)
def test_arithmetic_that_does_not_work_out(data: dict[str, Any], words: list[str]) -> None:
    message = error_of(data)
    assert all(word in message for word in words), message


def test_what_is_only_evaluated_has_no_training_to_contradict() -> None:
    assert not load_config("shapes", ["steps=0", "sampling.think=false"]).sampling.think
    # What was trained with guidance can be measured without.
    assert not load_config("cfg", ["steps=0", "evaluation.cfg.text_scale=1"]).evaluation.cfg.enabled


@pytest.mark.parametrize(
    ("data", "field", "value"),
    [
        ({"data": {"group_size": 1}}, "data.group_size", "1"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature", "0"),
        ({"optimizer": {"lr_denoising": -1e-4}}, "optimizer.lr_denoising", "-0.0001"),
        ({"optimizer": {"lr_reasoning": float("nan")}}, "optimizer.lr_reasoning", "nan"),
        ({"optimizer": {"lr_reasoning": float("inf")}}, "optimizer.lr_reasoning", "inf"),
        ({"rewards": [{"name": "shapes", "weight": float("nan")}]}, "rewards.0.weight", "nan"),
        ({"sampling": {"shift": float("inf")}}, "sampling.shift", "inf"),
        ({"sampling": {"temperature": 0.001}}, "sampling.temperature", "0.001"),
        ({"optimizer": {"betas": [1.5, 0.9]}}, "optimizer.betas.0", "1.5"),
        ({"evaluation": {"seed": -1}}, "evaluation.seed", "-1"),
        ({"objective": {"advantage_std": "grup"}}, "objective.advantage_std", "'grup'"),
        ({"steps": "many"}, "steps", "'many'"),
        ({"rewards": []}, "rewards", "[]"),
        ({"run_name": "../escape"}, "run_name", "'../escape'"),
        ({"learner": None}, "learner", "None"),
    ],
)
def test_values_out_of_range_are_named(data: dict[str, Any], field: str, value: str) -> None:
    message = error_of(data)
    assert f"{field} is {value}" in message, message


def test_overrides_of_nested_and_list_fields() -> None:
    overrides = [
        "steps=3",
        "optimizer.lr_denoising=1e-4",
        "sampling.window_range=[1, 4]",
        "sampling.window_range.1=5",
        "rewards.0.weight=2.5",
        "rewards.0.options.points=7",
        "objective.image_clip=1e-6",
        "run_name=try-1",
        "recording.trackers=[]",
        "objective.ratio_norm=false",
    ]
    config = validate(apply_overrides({"rewards": [{"name": "shapes"}], "steps": 9, "seed": 4}, overrides))
    assert config.steps == 3
    assert config.seed == 4, "what is not overridden stays"
    assert config.optimizer.lr_denoising == 1e-4
    assert config.sampling.window_range == (1, 5)
    assert (config.rewards[0].weight, config.rewards[0].options) == (2.5, {"points": 7})
    assert config.objective.image_clip == 1e-6
    assert config.run_name == "try-1"
    assert config.recording.trackers == ()
    assert config.objective.ratio_norm is False


def test_overrides_leave_the_recipe_as_it_was() -> None:
    recipe = {"rewards": [{"name": "shapes"}], "data": {"group_size": 4}}
    apply_overrides(recipe, ["data.group_size=8", "rewards.0.name=other"])
    assert recipe == {"rewards": [{"name": "shapes"}], "data": {"group_size": 4}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", ["'steps' is not key=value"]),
        ("=3", ["is not key=value"]),
        ("rewards.3.weight=1", ["rewards.3.weight", "3 is not an entry of a list of 1"]),
        ("rewards.first.weight=1", ["first is not an entry"]),
        ("rewards.-1=1", ["-1 is not an entry"]),
        ("steps.more=1", ["steps is a value, not a section"]),
        ("data.train=[1,", ["the value is not valid YAML"]),
    ],
)
def test_overrides_that_make_no_sense(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides({"steps": 1, "rewards": [{"name": "shapes"}]}, [override])
    assert all(word in str(error.value) for word in words), error.value


def test_yaml_round_trip() -> None:
    data = {
        "run_name": "round-trip",
        "seed": 7,
        "sampling": {"window_range": [1, 6], "points": 25, "noise_level": 0.8},
        "objective": {"image_clip": 1e-6, "regulariser_weight": 1.5e-6},
        "rewards": [{"name": "shapes", "weight": 0.5, "options": {"a": [1, "x"]}}, {"name": "clip_score"}],
        "recording": {"trackers": ["tensorboard", "wandb"]},
        "max_staleness": 1,
    }
    config = validate(data)
    again = validate(yaml.safe_load(to_yaml(config)))
    assert again == config
    assert again.objective.regulariser_weight == 1.5e-6
    assert validate(yaml.safe_load(to_yaml(TrainConfig()))) == TrainConfig()


def test_written_yaml_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(load_config("shapes")))
    assert load_config(str(path)) == load_config("shapes")
    assert load_config(str(path), ["steps=1"]).steps == 1


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.yaml") if "sft" not in p.stem))
def test_training_recipes_are_valid(recipe: str) -> None:
    assert isinstance(load_config(recipe), TrainConfig)


def test_recipes_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe shape is neither .*; did you mean shapes\?"):
        read_recipe("shape")
    for content, message in (("[1, 2]", "holds a list; a recipe is a mapping"), ("a: [", "is not valid YAML")):
        path = tmp_path / "broken.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_recipe(str(path))


def test_paths_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("pyproject.toml") == REPOSITORY / "pyproject.toml"
    (tmp_path / "pyproject.toml").touch()
    assert resolve_path("pyproject.toml") == (tmp_path / "pyproject.toml").resolve(), "the working directory first"
    with pytest.raises(ConfigError, match=r"no/such does not exist .* correct the path"):
        resolve_path("no/such")


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"warmup_steps": 10}, {0: 0.1, 4: 0.5, 9: 1.0, 99: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 25: 0.8536, 50: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "warmup_steps": 100}, {49: 0.5 * 0.5157, 50: 0.51 * 0.5}),
    ],
)
def test_learning_rates_follow_their_schedule(fields: dict[str, Any], factors: dict[int, float]) -> None:
    optimizer = Optimizer(**fields)
    assert {step: round(optimizer.learning_rate_factor(step, 100), 4) for step in factors} == pytest.approx(
        factors, abs=1e-4
    )


def test_a_config_does_not_change() -> None:
    config = TrainConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 5  # type: ignore[misc]


def test_importing_the_config_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "vllm", "deepspeed", "transformers", "diffusers")
    code = f"import sys, common.config; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_extends_lays_a_recipe_on_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: shapes\nsteps: 3\noptimizer: {lr_reasoning: 1}\nrewards: [{name: shapes, weight: 2}]\n")
    base, mine = load_config("shapes"), load_config(str(path))
    assert mine.steps == 3 and mine.optimizer.lr_reasoning == 1
    assert mine.optimizer.lr_denoising == base.optimizer.lr_denoising
    assert [scorer.weight for scorer in mine.rewards] == [2]
    assert mine.sampling == base.sampling


@pytest.mark.parametrize(
    ("content", "message"),
    [("extends: {}", "extend each other"), ("extends: shaps", "did you mean shapes")],
)
def test_extends_that_leads_nowhere(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content.format(path))
    with pytest.raises(ConfigError, match=message):
        read_recipe(str(path))


@pytest.mark.parametrize(
    ("cpuinfo", "gpus", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\n", 0, "bfloat16"),
        ("Features\t: fp asimd bf16\n", 0, "bfloat16"),
        ("flags\t\t: fpu avx2\nbugs\t\t: amx_bf16\n", 0, "float32"),
        ("flags\t\t: fpu avx2\n", 1, "bfloat16"),
        (None, 0, "float32"),
    ],
)
def test_the_compute_type_is_what_the_hardware_multiplies(
    cpuinfo: str | None, gpus: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(hardware, "CPUINFO", file)
    monkeypatch.setattr("common.config.cpu_has_bfloat16", hardware.cpu_has_bfloat16.__wrapped__)
    config = validate({"rollout": {"gpus": gpus}, "learner": {"gpus": gpus}})
    assert config.rollout.dtype == config.learner.dtype == dtype
    assert validate({"learner": {"dtype": "float32", "gpus": gpus}}).learner.dtype == "float32"


@pytest.mark.parametrize(
    "name", ["api_key", "apiKey", "clientSecret", "TOKEN", "hf_token", "password", "Authorization"]
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards\.0\.options\.{name} looks like a secret.*environment") as error:
        validate({"rewards": [{"name": "mine", "options": {name: "s3cret"}}]})
    assert "s3cret" not in str(error.value)
    with pytest.raises(ConfigError, match=rf"rewards\.0\.options\.headers\.1\.{name} looks like a secret"):
        validate({"rewards": [{"name": "mine", "options": {"headers": [{}, {name: "s3cret"}]}}]})
    for url in (f"https://host/score?a=b&{name}=s3cret", "https://user:s3cret@host/score", "https://s3cret@host/score"):
        with pytest.raises(ConfigError, match=r"rewards\.0\.options\.url looks like a secret") as error:
            validate({"rewards": [{"name": "mine", "options": {"url": url}}]})
        assert "s3cret" not in str(error.value)
    fine = {f"{name}_env": "NAME", "keys": "a", "tokens": "b", "monkey": "c", "url": "https://host/score?author=d"}
    validate({"rewards": [{"name": "mine", "options": fine}]})
