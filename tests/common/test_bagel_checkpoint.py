"""Checkpoints to and from disk: exact round trips under the released names, and errors that name file and tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_numbers import CHECKPOINT, golden
from safetensors.torch import load_file, save_file

from common.bagel import checkpoint as store
from common.bagel.checkpoint import AUTOENCODER, WEIGHTS, Checkpoint
from common.bagel.config import VAEConfig
from common.bagel.vae import build_vae, from_diffusers, vae_shapes
from common.checkpoint_files import CheckpointError

LM_HEAD = "language_model.lm_head.weight"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "ckpt", copy_function=shutil.copyfile))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "geometry",
    [
        VAEConfig(),
        VAEConfig(z_channels=4, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1),
        VAEConfig(in_channels=1, out_ch=2, ch=32, ch_mult=(2, 1, 3), num_res_blocks=3),
    ],
)
def test_shapes_of_the_autoencoder_are_those_of_diffusers(geometry: VAEConfig) -> None:
    with torch.device("meta"):
        built = from_diffusers(build_vae(geometry).state_dict(), len(geometry.ch_mult))
    assert vae_shapes(geometry) == {name: tuple(tensor.shape) for name, tensor in built.items()}


def test_who_does_not_decode_imports_neither_diffusers_nor_torchs_compiler() -> None:
    """They take seconds of every start: of the driver's, and of every learner rank's."""
    program = (
        "import sys, pathlib, common.bagel.checkpoint as store; path = pathlib.Path(sys.argv[1]); store.check(path);"
        "store.load(path); assert not {'diffusers', 'torch._dynamo'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(CHECKPOINT)], check=True, timeout=120)


@pytest.mark.parametrize("understanding", [False, True])
def test_round_trip_is_exact_and_keeps_the_released_layout(tmp_path: Path, understanding: bool) -> None:
    """Every file and tensor, whether the policy uses it or not."""
    source = store.load(CHECKPOINT, understanding=understanding)
    store.save(source, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {path.name for path in CHECKPOINT.iterdir()}
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes(), path.name
            continue
        released, saved = load_file(path), load_file(tmp_path / "saved" / path.name)
        assert saved.keys() == released.keys()
        for name, tensor in released.items():
            assert torch.equal(saved[name], tensor), name


def test_what_is_loaded_again_is_the_same(golden_checkpoint: Checkpoint, tmp_path: Path) -> None:
    store.save(golden_checkpoint, tmp_path / "saved")
    loaded = store.load(tmp_path / "saved")
    for name, tensor in golden_checkpoint.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor), name
    for name, tensor in golden_checkpoint.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], tensor), name
    assert loaded.config == golden_checkpoint.config
    assert store.check(tmp_path / "saved") == golden_checkpoint.config
    ids = golden("bagel/text.npz")["c_ids"].tolist()
    text = golden_checkpoint.chat.decode(ids)
    assert loaded.chat.encode(text) == golden_checkpoint.chat.encode(text)
    specials = ("start", "end", "vision_start", "vision_end")
    assert [getattr(loaded.chat, s) for s in specials] == [getattr(golden_checkpoint.chat, s) for s in specials]


def test_saving_twice_replaces_and_leaves_nothing_aside(golden_checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    store.save(golden_checkpoint, target)
    (target / "stale.json").write_text("{}")
    weights = {name: t + 1 for name, t in golden_checkpoint.policy.state_dict().items()}
    store.save(golden_checkpoint, target, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not (target / "stale.json").exists()
    assert torch.equal(load_file(target / WEIGHTS)[LM_HEAD], weights[LM_HEAD])


def test_loads_in_another_type(golden_checkpoint: Checkpoint) -> None:
    loaded = store.load(CHECKPOINT, torch.bfloat16)
    for name, tensor in golden_checkpoint.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor.bfloat16()), name


def test_frozen_parts_are_frozen(golden_checkpoint: Checkpoint) -> None:
    assert not any(p.requires_grad for p in golden_checkpoint.vae.parameters())
    assert not golden_checkpoint.policy.latent_pos_embed.pos_embed.requires_grad


def test_what_the_policy_does_not_use_survives_the_loss_of_its_source(copy: Path, tmp_path: Path) -> None:
    """A resumed run outlives the checkpoint it came from; what it carries is not in memory, only mapped."""
    loaded = store.load(copy)
    shutil.rmtree(copy)
    store.save(loaded, tmp_path / "saved")
    released, saved = load_file(CHECKPOINT / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    tower = [name for name in released if name not in loaded.policy.state_dict()]
    assert tower
    assert all(torch.equal(saved[name], released[name]) for name in tower)
    assert (tmp_path / "saved/vit_config.json").exists()


def test_a_checkpoint_without_image_understanding(copy: Path) -> None:
    """If the config says so; if it does not, the tensors are missing."""
    tower = ("vit_model.", "connector.", "vit_pos_embed.")
    rewrite(copy / WEIGHTS, lambda t: [t.pop(name) for name in list(t) if name.startswith(tower)])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor connector\.\S+ is missing"):
        store.load(copy)
    edit(copy / "config.json", lambda data: data.update(visual_und=False))
    assert not store.load(copy).carried
    with pytest.raises(CheckpointError, match="this checkpoint does not understand images"):
        store.load(copy, understanding=True)


def test_a_tied_head_is_one_parameter_and_is_saved_once(copy: Path, tmp_path: Path) -> None:
    rewrite(copy / WEIGHTS, lambda t: t.pop(LM_HEAD))
    for file in ("config.json", "llm_config.json"):
        edit(copy / file, lambda data: data.get("llm_config", data).update(tie_word_embeddings=True))
    loaded = store.load(copy)
    model = loaded.policy.language_model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    store.save(loaded, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(copy / WEIGHTS).keys()
    store.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("file", "tensor"), [(WEIGHTS, LM_HEAD), (WEIGHTS, "vae2llm.bias"), (AUTOENCODER, "decoder.conv_in.weight")]
)
def test_missing_extra_and_misshapen_tensors_are_named(copy: Path, file: str, tensor: str) -> None:
    path, whole = copy / file, load_file(copy / file)
    rewrite(path, lambda t: t.pop(tensor))
    for read in (store.load, store.check):
        with pytest.raises(CheckpointError, match=rf"{file}: tensor {tensor} is missing"):
            read(copy)
    save_file({**whole, f"{tensor}.more": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {tensor}.more is not part"):
        store.load(copy)
    save_file({**whole, tensor: torch.zeros(3, 5)}, path)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {tensor} has shape \(3, 5\), the config says"):
        store.load(copy)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(("file", "tensor"), [(WEIGHTS, LM_HEAD), (AUTOENCODER, "decoder.conv_in.weight")])
def test_a_number_that_is_none_is_refused(copy: Path, file: str, tensor: str, number: float) -> None:
    """One is enough to draw noise, which a scorer takes for a wrong image."""
    rewrite(copy / file, lambda t: t[tensor].view(-1)[-1:].fill_(number))
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {tensor} has NaN or infinite numbers"):
        store.load(copy)


@pytest.mark.parametrize("file", [WEIGHTS, AUTOENCODER])
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(copy: Path, file: str, keep: int) -> None:
    """Whatever is left of the file: nothing, part of the header, or all but the last byte."""
    path = copy / file
    path.write_bytes(path.read_bytes()[:keep])
    for read in (store.load, store.check):
        with pytest.raises(CheckpointError, match=rf"{file} is truncated"):
            read(copy)


@pytest.mark.parametrize("file", [WEIGHTS, AUTOENCODER, "config.json", "tokenizer.json"])
def test_missing_files(copy: Path, file: str) -> None:
    (copy / file).unlink()
    for read in (store.load, store.check):
        with pytest.raises(CheckpointError, match=rf"{file} is missing"):
            read(copy)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory; give the path of a checkpoint"):
        store.check(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["config.json", "llm_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b'{"hidden_size": 12', b"\xff\xfe\x00binary", b""])
def test_broken_json(copy: Path, file: str, content: bytes) -> None:
    (copy / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        store.load(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "wide"),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 997),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("hidden_act", "gelu"),
    ],
)
def test_sizes_that_cannot_be(copy: Path, key: str, value: Any) -> None:
    edit(copy / "llm_config.json", lambda data: data.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"config.json: .*{key}"):
        store.load(copy)


def test_rope_as_transformers_5_writes_it(copy: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data.pop("rope_theta", None)
        data.update(rope_parameters={"rope_type": "default", "rope_theta": 5e4})

    edit(copy / "llm_config.json", change)
    assert store.load(copy).config.llm_config.rope_theta == 5e4
    edit(copy / "llm_config.json", lambda data: data.update(rope_theta=1e6))
    with pytest.raises(CheckpointError, match=r"rope_theta is 1000000\.0 but rope_parameters says 50000\.0"):
        store.load(copy)
    edit(copy / "llm_config.json", lambda data: data.update(rope_parameters={"rope_type": "yarn", "factor": 4.0}))
    with pytest.raises(CheckpointError, match="rope_parameters has the rope_type 'yarn'"):
        store.load(copy)


def test_a_head_of_its_own_that_the_config_calls_tied(copy: Path) -> None:
    """It would be dropped, and with it what it learned."""
    for file in ("config.json", "llm_config.json"):
        edit(copy / file, lambda data: data.get("llm_config", data).update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=rf"tensor {LM_HEAD} is another than .* say false"):
        store.load(copy)
    rewrite(copy / WEIGHTS, lambda t: t.update({LM_HEAD: t["language_model.model.embed_tokens.weight"].clone()}))
    store.load(copy)


def test_sizes_of_another_model(copy: Path) -> None:
    edit(copy / "llm_config.json", lambda data: data.update(num_hidden_layers=data["num_hidden_layers"] + 1))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor language_model\.model\.layers\.\S+ is missing"):
        store.load(copy)


def test_a_stated_factor_that_the_levels_do_not_give(copy: Path) -> None:
    edit(copy / "config.json", lambda data: data["vae_config"].update(downsample=2 * data["vae_config"]["downsample"]))
    with pytest.raises(CheckpointError, match=r"config\.json: vae_config: .*downsample=\d+ is not what \d levels"):
        store.check(copy)


def test_more_patches_than_positions(copy: Path) -> None:
    side = json.loads((copy / "config.json").read_text())["vit_max_num_patch_per_side"]
    edit(copy / "vit_config.json", lambda data: data.update(image_size=(side - 1) * data["patch_size"]))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*vit_max_num_patch_per_side={side} is more than the"):
        store.check(copy)


def test_a_config_that_holds_a_list(copy: Path) -> None:
    (copy / "llm_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"llm_config\.json holds a list, not an object"):
        store.load(copy)
    (copy / "llm_config.json").unlink()
    edit(copy / "config.json", lambda data: data.update(llm_config=[]))
    with pytest.raises(CheckpointError, match=r"config\.json: llm_config"):
        store.load(copy)


def test_special_id_outside_the_vocabulary(copy: Path, golden_checkpoint: Checkpoint) -> None:
    chat = golden_checkpoint.chat
    last = max(chat.start, chat.end, chat.vision_start, chat.vision_end)
    edit(copy / "llm_config.json", lambda data: data.update(vocab_size=last))
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: <\|\w+\|> has id {last}, outside the vocabulary"):
        store.check(copy)


def test_special_token_unknown_to_the_tokenizer(copy: Path) -> None:
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("<|vision_start|>", "<|nothing|>"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no token <\|vision_start\|>"):
        store.check(copy)


def test_image_sizes_and_their_grid(golden_checkpoint: Checkpoint) -> None:
    config = golden_checkpoint.config
    side, most = config.pixels_per_token, config.max_latent_size
    assert config.grid(2 * side, 3 * side) == (2, 3)
    with pytest.raises(ValueError, match=f"image size {side + 1}x{side} is not a multiple of {side} pixels"):
        config.grid(side + 1, side)
    with pytest.raises(ValueError, match=f"needs 1x{most + 1} tokens; max_latent_size is {most}"):
        config.grid(side, (most + 1) * side)
