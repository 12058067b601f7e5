"""Predicted sizes against real ones: parameters, what a forward keeps for its backward, what the engine allocates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_numbers import CHECKPOINT
from tiny_models import FAMILIES
from typer.testing import CliRunner

from common.bagel import checkpoint as store
from common.bagel.config import BagelConfig
from common.bagel.sizes import BagelSizes
from common.bagel.vae import build_vae, decode
from common.composed.family import Conditioning
from common.config import ConfigError, Learner, Optimizer, TrainConfig
from common.parameters import choose
from common.policy import open_policy
from common.recipe import load_config, validate
from common.rehearsal import rehearse
from common.sizes import ChainShape, Sizes, describing, sizes_of
from deploy.bench.measure import random_policy
from deploy.bench.packed import _batch, random_work
from deploy.cli import app
from deploy.devices import DEVICES, parse_gpus
from deploy.plan import learner_memory, number_bytes, replica_memory, step_time
from deploy.preflight import demands

SHAPES = Path(__file__).parents[2] / "deploy/models/shapes"
GPU_RUN = {
    "model": {"path": str(SHAPES)},
    "rollout": {"gpus": 1, "replicas": 1, "dtype": "bfloat16"},
    "learner": {"gpus": 1, "ranks": 1, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module", autouse=True)
def sizes_once() -> Iterator[Callable[[TrainConfig], Sizes]]:
    """Going through sixty layers takes seconds: once per recipe."""
    known: dict[str, Sizes] = {}

    def once(config: TrainConfig) -> Sizes:
        key = config.model_dump_json()
        return known[key] if key in known else known.setdefault(key, sizes_of(config))

    patch = pytest.MonkeyPatch()
    patch.setattr("deploy.plan.sizes_of", once)
    yield once
    patch.undo()


@pytest.fixture(scope="module")
def sizes() -> BagelSizes:
    return BagelSizes.read(SHAPES)


@pytest.mark.parametrize("directory", [SHAPES, CHECKPOINT])
def test_parameters_are_those_of_the_checkpoint(directory: Path) -> None:
    loaded, predicted = store.load(directory), BagelSizes.read(directory)
    groups = loaded.policy.parameter_groups()
    assert predicted.counts.trainable == {role: sum(p.numel() for _, p in pairs) for role, pairs in groups.items()}
    assert predicted.counts.policy == sum(p.numel() for p in loaded.policy.parameters())
    assert predicted.frozen_bytes(2) == 4 * sum(p.numel() for p in loaded.vae.parameters())
    assert predicted.reasoner == sum(t.numel() for _, t in loaded.policy.reasoning_weights())


def kept_bytes(policy: torch.nn.Module, batch: Any) -> int:
    """Bytes of the distinct tensors that autograd keeps of one training forward, parameters left out."""
    weights = {p.data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = policy(batch)
    assert output.velocity.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "shape", [ChainShape(60, 32, 16, 3), ChainShape(30, 20, 64, 2), ChainShape(120, 100, 16, 1)], ids=str
)
def test_activations_are_within_a_seventh_of_what_autograd_keeps(shape: ChainShape) -> None:
    config = BagelConfig.read(SHAPES)
    layers, side = config.llm_config.num_hidden_layers, config.max_latent_size
    length, grid = (shape.text, shape.text), (side, shape.image // side)
    work = random_work(config, chains=4, window=shape.window, context=length, scored=shape.scored, grid=grid)
    batch = _batch(work, range(4), range(shape.window), True)
    measured = kept_bytes(random_policy(config, torch.float32), batch)
    # The plan adds one layer's gradients to what is kept.
    predicted = 4 * BagelSizes.read(SHAPES).training_bytes(shape, 4, recompute=False) * layers / (layers + 1)
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("images", [1, 4])
def test_decoding_is_within_a_tenth_of_what_the_autoencoder_holds(images: int) -> None:
    sizes, side = BagelSizes.read(describing("models/BAGEL-7B-MoT")), 32
    with torch.device("meta"):
        vae = build_vae(sizes.config.vae_config).eval()
        tokens = torch.empty(images, side * side, sizes.config.token_dim)
    held = rehearse([vae], lambda: decode(vae, sizes.config, tokens, (side, side))).most_bytes
    assert sizes.decoding_bytes(images, side * side, 2) == pytest.approx(held, rel=0.1)


def test_recomputing_keeps_less_the_deeper_the_model() -> None:
    chain = ChainShape(1300, 1000, 4096, 3)
    deep = BagelSizes.read(describing("models/BAGEL-7B-MoT"))
    assert deep.training_bytes(chain, 2, recompute=True) < deep.training_bytes(chain, 2, recompute=False) / 7


def test_stable_diffusion_and_qwen_have_the_released_sizes(sizes_once: Callable[[TrainConfig], Sizes]) -> None:
    """2.2 billion in SD3.5 medium's transformer, 4.7 in T5-XXL; 20.4 in Qwen-Image's, 8.3 in its encoder; 3.1 in the
    language model of both recipes."""
    sd, qwen = (sizes_once(load_config(recipe)) for recipe in ("sd35-1gpu", "qwen-image-8gpu"))
    assert sd.denoiser == pytest.approx(2.24e9, rel=0.01) and qwen.denoiser == pytest.approx(20.4e9, rel=0.01)
    assert sd.frozen_bytes(1) == pytest.approx((0.12 + 0.69 + 4.76 + 0.08) * 1e9, rel=0.01)
    assert qwen.frozen_bytes(1) == pytest.approx((8.29 + 0.13) * 1e9, rel=0.01)
    assert sd.reasoner == qwen.reasoner == pytest.approx(3.09e9, rel=0.01)
    assert qwen.image_tokens(1024, 1024) == 4096 and sd.kv_numbers == 2 * 36 * 2 * 128


def test_bagel_7b_has_the_released_size() -> None:
    """14.7 billion parameters with the vision encoder, which is left out here; the released file is 29 GB of bf16."""
    sizes = BagelSizes.read(describing("models/BAGEL-7B-MoT"))
    assert sizes.counts.policy == pytest.approx(14.2e9, rel=0.01)
    assert sizes.reasoner == pytest.approx(7.6e9, rel=0.01)
    assert sizes.image_tokens(1024, 1024) == 4096
    assert sizes.kv_numbers == 2 * 28 * 4 * 128


def test_zero_shards_what_its_stage_says(sizes: BagelSizes) -> None:
    def parts(stage: int, ranks: int) -> dict[str, float]:
        config = validate({**GPU_RUN, "learner": {**GPU_RUN["learner"], "ranks": ranks, "zero_stage": stage}})
        return learner_memory(config, sizes).parts

    one, two = parts(1, 4), parts(2, 4)
    assert one["optimizer"] == two["optimizer"] == parts(2, 1)["optimizer"] / 4
    assert one["gradients"] == sum(sizes.counts.trainable.values()) * 2, "in the compute type"
    assert two["gradients"] == sum(sizes.counts.trainable.values()) * 4 / 4, "fp32 on four ranks"
    assert one["weights"] == sizes.counts.policy * 2


def test_a_run_without_a_reference_has_none(sizes: BagelSizes) -> None:
    config = validate(GPU_RUN)
    assert learner_memory(config, sizes).parts["reference"] == sizes.counts.policy * 2


def test_vllm_takes_its_share_and_is_refused_without_room_for_a_sequence(sizes: BagelSizes) -> None:
    device = DEVICES["H100-80GB"]
    config = validate(GPU_RUN)
    (memory,) = replica_memory(config, sizes, device)
    assert memory.parts["reasoner"] + memory.parts["KV cache"] == pytest.approx(0.4 * 80e9)
    assert not memory.fault
    big = BagelSizes.read(describing("models/BAGEL-7B-MoT"))
    starved = validate({**GPU_RUN, "rollout": {**GPU_RUN["rollout"], "gpu_memory_utilization": 0.15}})
    assert "no room for one sequence" in replica_memory(starved, big, device)[0].fault


def test_a_reasoner_of_its_own_leaves_the_replica_the_denoiser(sizes: BagelSizes) -> None:
    device = DEVICES["H100-80GB"]
    own = {"rollout": {**GPU_RUN["rollout"], "reasoner_actor": {"gpus": 1}}}
    (together,) = replica_memory(validate(GPU_RUN), sizes, device)
    drawing, reasoning = replica_memory(validate({**GPU_RUN, **own}), sizes, device)
    assert drawing.parts | reasoning.parts == together.parts and not drawing.parts.keys() & reasoning.parts.keys()
    assert (drawing.kind, reasoning.kind, reasoning.count, reasoning.share) == ("rollout", "reasoner", 1, 1)
    held = f"{sizes.counts.trainable['reasoning'] * 2 / 1e9:.3g} GB of the"
    assert held in together.remarks[-1] and held in reasoning.remarks[-1]
    asked = {demand.kind: demand.given.gpus for demand in demands(validate({**GPU_RUN, **own}))}
    assert asked["rollout"] == asked["reasoner"] == 1


def test_time_follows_rates_and_work(sizes: BagelSizes) -> None:
    device = replace(DEVICES["H100-80GB"], decode_s=0.0)
    base = step_time(validate(GPU_RUN), sizes, device)
    faster = step_time(validate(GPU_RUN), sizes, replace(device, tflops=2 * device.tflops))
    assert faster.drawing == pytest.approx(base.drawing / 2)
    assert faster.update == pytest.approx(base.update / 2)
    # Forward, backward and reference are 4 forwards' worth; a second epoch adds 3, and a second minibatch the pass of
    # the old policy over its half.
    for objective, forwards in (({"epochs": 2}, 7), ({"minibatches": 2}, 4.5), ({"epochs": 2, "minibatches": 2}, 7.5)):
        again = step_time(validate({**GPU_RUN, "objective": objective}), sizes, device)
        assert again.update == pytest.approx(base.update * forwards / 4)
    ranks = validate({**GPU_RUN, "learner": {**GPU_RUN["learner"], "ranks": 2}})
    assert step_time(ranks, sizes, device).update == pytest.approx(base.update / 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("8", "is not COUNTxKIND"), ("0xH100-80GB", "is not COUNTxKIND"), ("8xH100-80G", "did you mean H100-80GB")],
)
def test_bad_gpus(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_gpus(text)
    assert parse_gpus("2xh100-80gb").kind == "H100-80GB"


def test_an_unknown_checkpoint_names_those_that_are_described() -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist.*BAGEL-7B-MoT"):
        describing("models/nowhere")


def composed_config(root: Path, family: str, **learner: object) -> TrainConfig:
    return validate(
        {
            "model": {"path": str(root / "qwen2"), "pipeline": str(root / family)},
            "rollout": {"dtype": "float32"},
            "learner": {"dtype": "float32", **learner},
        }
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_composed_parameters_are_those_of_the_checkpoint(tiny_models: Path, family: str) -> None:
    opened = open_policy(composed_config(tiny_models, family).model)
    policy, others = opened.policy, opened.pipeline.components.values()
    frozen = [m for m in others if isinstance(m, torch.nn.Module) and m is not policy.transformer]
    sizes = sizes_of(composed_config(tiny_models, family))
    assert sizes.counts.policy == sizes.counts.held == sum(p.numel() for p in policy.parameters())
    assert sizes.reasoner == sum(p.numel() for _, p in policy.reasoning_weights()) == sizes.host
    assert sizes.denoiser == sum(p.numel() for p in policy.transformer.parameters())
    assert sizes.frozen_bytes(2) == 2 * sum(p.numel() for m in frozen for p in m.parameters())
    assert sizes.counts.trainable == {
        role: sum(p.numel() for _, p in pairs) for role, pairs in policy.parameter_groups().items()
    }


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_composed_activations_are_within_a_seventh_of_what_autograd_keeps(
    tiny_models: Path, family: str, lora: dict[str, int] | None
) -> None:
    config = composed_config(tiny_models, family, lora=lora)
    opened = open_policy(config.model)
    choose(opened.policy, config.learner, config.optimizer)
    chain, grid = ChainShape(text=60, scored=40, image=64, window=3), (8, 8)
    x_t, owner = torch.randn(chain.window, chain.image, opened.token_dim), torch.zeros(chain.window, dtype=torch.long)
    words = torch.randint(33, 90, (chain.text,)).tolist()
    batch = opened.pack([(words[:20], words[20:])], x_t, torch.rand(chain.window), owner, grid)
    given = batch.conditioning
    if given.mask is not None:  # as many tokens as were sampled; the tiny tokenizer makes more
        cut = Conditioning(given.embeds[:, : chain.scored], given.pooled, given.mask[:, : chain.scored])
        batch = replace(batch, conditioning=cut)
    measured = kept_bytes(opened.policy, batch)
    sizes = sizes_of(config)
    counted = sizes.kept(chain, 4).all
    assert counted == pytest.approx(measured, rel=0.15)
    assert sizes.training_bytes(chain, 4, recompute=True) < sizes.training_bytes(chain, 4, recompute=False)


def test_adapters_alone_have_gradients_and_moments(tiny_models: Path) -> None:
    config = composed_config(tiny_models, "sd3", lora={"rank": 4}, ranks=1, activation_checkpointing=True)
    sizes = sizes_of(config)
    parts = learner_memory(config, sizes).parts
    adapters = sum(sizes.counts.trainable.values())
    assert 0 < adapters < sizes.counts.policy / 10 and sizes.counts.held == sizes.counts.policy + adapters
    assert parts["optimizer"] == 12 * adapters and parts["gradients"] == 4 * adapters and parts["reference"] == 0
    drawing = replica_memory(config, sizes, None)[0].parts["denoiser"]
    assert drawing == (sizes.denoiser + adapters) * number_bytes(config.rollout.dtype)
    half = config.model_copy(update={"learner": Learner(ranks=1), "optimizer": Optimizer(frozen=("reasoning",))})
    assert sizes_of(half).counts.trainable == {"reasoning": 0, "denoising": sizes.denoiser}


RECIPES = {
    "bagel-8gpu": "8xH200-141GB",
    "bagel-disaggregated": "16xH100-80GB",
    "sd35-1gpu": "1xH100-80GB",
    "qwen-image-8gpu": "8xH100-80GB",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_for_released_checkpoints_fit_what_they_are_for(recipe: str) -> None:
    """No weights and no GPU are here; a GPU of half the memory would not do."""
    shown = CliRunner().invoke(app, ["train", recipe, "--dry-run", "--gpus", RECIPES[recipe]])
    assert shown.exit_code == 0, shown.output
    for word in ("weights", "optimizer", "gradients", "activations", "KV cache", "is not here", "fits"):
        assert word in shown.output
    count = RECIPES[recipe].partition("x")[0]
    small = CliRunner().invoke(app, ["plan", recipe, "--gpus", f"{count}xA100-40GB"])
    assert small.exit_code == 1
    assert "does not fit" in small.output and "learner needs" in small.output


def test_a_plan_says_how_long_a_step_takes() -> None:
    shown = CliRunner().invoke(app, ["plan", "bagel-disaggregated", "--gpus", "12xH100-80GB"])
    assert shown.exit_code == 1
    assert "the actors ask for 16 GPUs, there are 12" in shown.output
    assert "rollout and update overlap" in shown.output
