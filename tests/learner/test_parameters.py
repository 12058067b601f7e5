"""Which parameters are trained: the printed table, what may be frozen, and that frozen parts do not move."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import changed, make_chains, make_engine, micro_batch, snapshot, train_config
from golden_numbers import CHECKPOINT

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.config import ConfigError, Lora, Model, Objective, Optimizer, ParameterGroup
from common.lora import add_adapters, reference_of
from common.parameters import check_reached, freeze, groups, rates, table
from common.policy import open_policy, outline
from learner.update import Updater


def test_every_parameter_is_in_exactly_one_part_of_the_table() -> None:
    """Built without reading a tensor; the sizes add up to the model's."""
    skeleton = outline(Model(path=str(CHECKPOINT))).skeleton
    assert skeleton is not None
    policy = skeleton()
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    freeze(policy, ["language_model.model.embed_tokens.*", "llm2vae.bias"])
    text = table(policy, Optimizer(lr_reasoning=1e-6, lr_denoising=3e-5))
    titles = [line for line in text.splitlines()[1:] if not line.startswith("    ")]
    assert titles[0].startswith("  reasoning, learning rate 1e-06: ")
    assert titles[1].startswith("  denoising, learning rate 3e-05: ")
    assert titles[2].startswith("  frozen: ")
    counts = [
        [int(part.replace(",", "")) for part in title.split(": ")[1].split() if part[0].isdigit()] for title in titles
    ]
    assert sum(numbers for numbers, _ in counts) == sum(p.numel() for p in policy.parameters())
    assert sum(tensors for _, tensors in counts) == len(list(policy.parameters()))
    layers = policy.config.llm_config.num_hidden_layers
    assert f"    language_model.model.layers.*.mlp_moe_gen.up_proj.weight x {layers}" in text.splitlines()
    frozen = text[text.index("  frozen") :]
    assert all(name in frozen for name in ("embed_tokens.weight", "llm2vae.bias", "latent_pos_embed.pos_embed"))


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["resoning"], "names 'resoning', which is neither a group .reasoning, denoising. nor fits"),
        (["reasoning", "*embed_tokens*"], r"names '\*embed_tokens\*', .* still trained"),
        (["reasoning", "denoising"], "leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen(patterns: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.frozen {words}"):
        freeze(store.load(CHECKPOINT).policy, patterns)


def optimizer(*named: tuple[str, str, float], **fields: object) -> Optimizer:
    entries = tuple(ParameterGroup(name=name, pattern=pattern, lr=lr) for name, pattern, lr in named)
    return Optimizer(groups=entries, **fields)  # type: ignore[arg-type]


TEXT, IMAGE = {"image_weight": 0.0}, {"text_weight": 0.0}
CUT = {"image_grad_to_reasoning": False}


@pytest.mark.parametrize(
    ("fields", "objective", "unreached"),
    [
        ({}, {}, None),
        ({"lr_reasoning": 0.0}, {}, "text_weight is 1"),
        ({"lr_reasoning": 0.0}, IMAGE, None),
        ({"lr_reasoning": 0.0}, IMAGE | {"text_kl": 0.1}, "text_kl is 0.1"),
        ({"lr_denoising": 0.0}, {}, None),
        ({"lr_denoising": 0.0}, CUT, "image_weight is 1"),
        ({"frozen": ("reasoning",)}, {}, "text_weight is 1"),
        ({"frozen": ("denoising",)}, IMAGE | CUT, "image_weight is 1"),
        ({"frozen": ("denoising",)}, TEXT | CUT | {"regulariser": "none"}, None),
        ({"frozen": ("reasoning",), "lr_denoising": 0.0}, IMAGE, "image_weight is 1"),
    ],
)
def test_an_objective_that_would_train_nothing_is_refused(
    fields: dict[str, object], objective: dict[str, float | bool], unreached: str | None
) -> None:
    policy, rates_of = store.load(CHECKPOINT).policy, Optimizer.model_validate(fields)
    freeze(policy, rates_of.frozen)
    if unreached is None:
        return check_reached(policy, rates_of, Objective.model_validate(objective))
    with pytest.raises(ConfigError, match=f"objective.{unreached} but nothing that it reaches is trained .*set the w"):
        check_reached(policy, rates_of, Objective.model_validate(objective))


@pytest.mark.parametrize("regulariser", ["velocity_mse", "latent_kl"])
def test_a_regulariser_that_nothing_trained_can_move_is_refused(regulariser: str) -> None:
    """It would cost a reference and always be 0."""
    policy, frozen = store.load(CHECKPOINT).policy, Optimizer(frozen=("denoising",))
    freeze(policy, frozen.frozen)
    still = TEXT | {"regulariser": regulariser}
    check_reached(policy, frozen, Objective.model_validate(still))  # through keys and values
    with pytest.raises(
        ConfigError, match=rf"regulariser is {regulariser} but nothing that moves a velocity .* to none"
    ):
        check_reached(policy, frozen, Objective.model_validate(still | CUT))


def test_a_composed_policys_image_does_not_reach_its_language_model(tiny_models: Path) -> None:
    policy = outline(Model(path=str(tiny_models / "qwen2"), pipeline=str(tiny_models / "sd3"))).skeleton()
    check_reached(policy, Optimizer(), Objective())
    with pytest.raises(ConfigError, match=r"objective.image_weight is 1 .*\(denoising: "):
        check_reached(policy, Optimizer(lr_denoising=0.0), Objective())


def test_adapters_are_reached_too() -> None:
    policy = store.load(CHECKPOINT).policy
    add_adapters(policy, Lora(rank=2, target_modules=("q_proj", "q_proj_moe_gen")))
    check_reached(policy, Optimizer(), Objective())
    freeze(policy, ["*.q_proj.lora_*"])
    with pytest.raises(ConfigError, match=r"objective\.text_weight is 1"):
        check_reached(policy, Optimizer(), Objective())


def test_a_group_of_the_other_half_does_not_train_this_one() -> None:
    policy = store.load(CHECKPOINT).policy
    elsewhere = optimizer(("times", "*time_embedder*", 1e-4), lr_reasoning=0.0, lr_denoising=0.0)
    with pytest.raises(ConfigError, match=r"objective.text_weight is 1 .*\(reasoning: "):
        check_reached(policy, elsewhere, Objective())
    check_reached(policy, elsewhere, Objective(text_weight=0.0))
    check_reached(policy, optimizer(("head", "*lm_head*", 1e-4), lr_reasoning=0.0), Objective())


def test_the_first_pattern_that_fits_has_a_parameter_and_the_halves_have_the_rest() -> None:
    policy = store.load(CHECKPOINT).policy
    freeze(policy, ["*.layers.0.*"])
    asked = optimizer(("ends", "*llm2vae*", 1e-3), ("experts", "*_moe_gen.*", 2e-3), ("gates", "*.gate_proj.*", 3e-3))
    found = {name: {n for n, _ in pairs} for name, pairs in groups(policy, asked).items()}
    assert list(found) == list(rates(asked)) == ["reasoning", "denoising", "ends", "experts", "gates"]
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(name for names in found.values() for name in names), "each exactly once"
    assert found["ends"] == {"llm2vae.weight", "llm2vae.bias"}
    assert found["experts"] == {name for name in trained if "_moe_gen." in name} - found["ends"]
    assert found["gates"] == {name for name in trained if ".mlp.gate_proj." in name}, "the experts' own came first"
    halves = {half: {n for n, _ in pairs} for half, pairs in policy.parameter_groups().items()}
    assert found["reasoning"] == halves["reasoning"] - found["gates"]
    assert found["denoising"] == halves["denoising"] - found["ends"] - found["experts"]
    assert "  gates, learning rate 0.003: " in table(policy, asked)


@pytest.mark.parametrize(
    ("named", "place"),
    [
        ([("a", "*no_such_name*", 1.0)], 0),
        ([("a", "*_moe_gen.*", 1.0), ("b", "*.mlp_moe_gen.*", 1.0)], 1),
        ([("a", "*.weight", 1.0), ("b", "*.layers.0.*.bias", 1.0)], 1),
    ],
)
def test_a_group_that_would_be_empty_is_refused(named: list[tuple[str, str, float]], place: int) -> None:
    """Nothing has the name; a group before it took all; what it fits is frozen."""
    policy = store.load(CHECKPOINT).policy
    freeze(policy, ["*.layers.0.*"])
    with pytest.raises(ConfigError, match=rf"groups\.{place}\.pattern is .*fits no parameter .*in no group before"):
        groups(policy, optimizer(*named))


def test_groups_of_adapters() -> None:
    """With LoRA the trained names are the adapters', and only they are in the table's groups."""
    skeleton = outline(Model(path=str(CHECKPOINT))).skeleton
    assert skeleton is not None
    policy = skeleton()
    add_adapters(policy, Lora(rank=2))
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    found = groups(policy, optimizer(("values", "*.v_proj.lora_*", 1e-3)))
    assert found.keys() == {"reasoning", "denoising", "values"}
    assert all("lora_" in name for pairs in found.values() for name, _ in pairs)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, _ in found["values"]} == {"v_proj"}
    assert "v_proj_moe_gen.lora_A" in str([name for name, _ in found["denoising"]])


def test_adapters_beside_the_layers_that_images_come_in_and_out_by() -> None:
    skeleton = outline(Model(path=str(CHECKPOINT))).skeleton
    assert skeleton is not None
    policy = skeleton()
    add_adapters(policy, Lora(target_modules=("q_proj", "llm2vae", "vae2llm")))
    adapted = {name.split(".lora_")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name in adapted if "." not in name} == {"llm2vae", "vae2llm"}
    with pytest.raises(ConfigError, match=r"names q_porj, which is no linear layer .* end in .*q_proj"):
        add_adapters(skeleton(), Lora(target_modules=("q_proj", "llm2vae", "q_porj")))


def test_the_reference_of_adapters_leaves_frozen_ones_frozen() -> None:
    policy = open_policy(Model(path=str(CHECKPOINT)), frozen=None).policy
    add_adapters(policy, Lora(rank=2))
    freeze(policy, ["denoising"])
    before = [name for name, p in policy.named_parameters() if p.requires_grad]
    with pytest.raises(TypeError):  # of a forward without its arguments
        reference_of(policy)()
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == before


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("pattern", ["reasoning", "denoising", "*.mlp_moe_gen.*"])
def test_frozen_parts_stay_and_the_rest_moves(golden_checkpoint: Checkpoint, pattern: str) -> None:
    policy, reference = (store.load(CHECKPOINT).policy for _ in range(2))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    for one in (policy, reference):
        freeze(one, [pattern])
    frozen = trained - {name for name, p in policy.named_parameters() if p.requires_grad}
    assert frozen
    before = snapshot(policy)
    updater = Updater(make_engine(policy, lr=1e-3), reference, train_config(), 1e-4, 1)
    sums = updater.run([[micro_batch(golden_checkpoint, make_chains(golden_checkpoint, 3), [1.0, -1.0, 0.5])]], [3])
    assert sums["sum/image/velocity_mse"] == 0.0, "the reference computes with the same kernels"
    assert changed(policy, before) == trained - frozen
