"""Weights in one file or in shards: read through a memory map, checked by their headers, never from a pickle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_numbers import CHECKPOINT
from safetensors.torch import load_file, save_file

from common.bagel import checkpoint as store
from common.bagel.checkpoint import WEIGHTS, Checkpoint
from common.checkpoint_files import CheckpointError, read_tensors, write_tensors

INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def sharded(golden_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """The recorded checkpoint in shards of at most a fifth of its tensors."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in load_file(CHECKPOINT / WEIGHTS).values())
    store.save(golden_checkpoint, tmp_path / "sharded", shard_bytes=total // 5)
    return tmp_path / "sharded"


def test_shards_hold_every_tensor(golden_checkpoint: Checkpoint, sharded: Path, tmp_path: Path) -> None:
    released = load_file(CHECKPOINT / WEIGHTS)
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert where.keys() == released.keys()
    assert len(set(where.values())) > 3
    assert not (sharded / WEIGHTS).exists()
    for file in set(where.values()):
        held = load_file(sharded / file)
        assert all(torch.equal(tensor, released[name]) for name, tensor in held.items())
    loaded = store.load(sharded)
    for name, tensor in golden_checkpoint.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor), name
    store.save(loaded, tmp_path / "whole")
    assert not (tmp_path / "whole" / INDEX).exists(), "an index of files that are not there"
    whole = load_file(tmp_path / "whole" / WEIGHTS)
    assert all(torch.equal(whole[name], tensor) for name, tensor in released.items())


def test_the_transformers_name_is_read_too(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "model.safetensors.index.json")
    store.check(sharded)


Damage = Callable[[Path, str, str], str]


def lose_a_shard(directory: Path, tensor: str, file: str) -> str:
    (directory / file).unlink()
    return rf"{INDEX}: shard {file} with tensor \S+ is missing"


def cut_a_shard(directory: Path, tensor: str, file: str) -> str:
    (directory / file).write_bytes((directory / file).read_bytes()[:-1])
    return rf"{file} is truncated"


def lose_a_tensor(directory: Path, tensor: str, file: str) -> str:
    held = load_file(directory / file)
    del held[tensor]
    save_file(held, directory / file)
    return rf"{INDEX}: tensor {tensor} is not in {file}, where the index says it is"


def forget_a_tensor(directory: Path, tensor: str, file: str) -> str:
    """In index and shard alike: then the model lacks it."""
    lose_a_tensor(directory, tensor, file)
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][tensor]
    (directory / INDEX).write_text(json.dumps(index))
    return rf"{INDEX}: tensor {tensor} is missing \(1 missing in all\)"


def reshape_a_tensor(directory: Path, tensor: str, file: str) -> str:
    save_file({**load_file(directory / file), tensor: torch.zeros(3, 5)}, directory / file)
    return rf"{file}: tensor {tensor} has shape \(3, 5\), the config says"


def add_a_tensor(directory: Path, tensor: str, file: str) -> str:
    save_file({**load_file(directory / file), "stray": torch.zeros(1)}, directory / file)
    return rf"{file}: tensor stray is not part of the configured model"


def hold_a_tensor_twice(directory: Path, tensor: str, file: str) -> str:
    other = next(path for path in sorted(directory.glob("ema-*")) if path.name != file)
    save_file({**load_file(other), tensor: torch.zeros(1)}, other)
    return rf"{INDEX}: tensor {tensor} is in"


def leave_the_directory(directory: Path, tensor: str, file: str) -> str:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][tensor] = f"../{file}"
    (directory / INDEX).write_text(json.dumps(index))
    return rf"{INDEX}: tensor {tensor} is said to be in '\.\./{file}'; shards are safetensors files beside the index"


def empty_the_index(directory: Path, tensor: str, file: str) -> str:
    (directory / INDEX).write_text("{}")
    return rf"{INDEX} has no weight_map"


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_shard, cut_a_shard, lose_a_tensor, forget_a_tensor, reshape_a_tensor, add_a_tensor, hold_a_tensor_twice,
        leave_the_directory, empty_the_index,
    ],
)  # fmt: skip
def test_damaged_shards_are_named(sharded: Path, damage: Damage) -> None:
    tensor, file = next(iter(json.loads((sharded / INDEX).read_text())["weight_map"].items()))
    message = damage(sharded, tensor, file)
    for read in (store.check, store.load):
        with pytest.raises(CheckpointError, match=message):
            read(sharded)


@pytest.mark.parametrize("name", ["ema.safetensors", "pytorch_model.bin", "ema.pt", "model.ckpt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    """Under the right name and under its own, from torch.save's archive and from its older form."""
    for archive in (True, False):
        copy = Path(shutil.copytree(CHECKPOINT, tmp_path / f"{archive}", copy_function=shutil.copyfile))
        (copy / WEIGHTS).unlink()
        torch.save({"a": torch.zeros(2)}, copy / name, _use_new_zipfile_serialization=archive)
        for read in (store.check, store.load):
            with pytest.raises(CheckpointError, match=rf"{name}.* is a pickle, which can run code, and is not read"):
                read(copy)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in range(0x200):
        save_file({"a": torch.zeros(1)}, path, metadata={"x": "y" * length})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert torch.equal(read_tensors(path)["a"], torch.zeros(1))


MEASURE = """
import sys, torch
from pathlib import Path
from common.bagel import checkpoint
def peak(key="VmHWM"):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
checkpoint.load(Path(sys.argv[2]), torch.bfloat16)  # imports what loading needs
before = peak("VmRSS")
held = checkpoint.load(Path(sys.argv[1]), torch.bfloat16)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process accounts")
def test_loading_holds_no_second_copy(golden_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Peak memory is what stays plus the pages of the map, which the kernel may drop; another copy in the file's type
    would be as much again."""
    big = Path(shutil.copytree(CHECKPOINT, tmp_path / "big", copy_function=shutil.copyfile))
    rows = 200_000
    for file in ("config.json", "llm_config.json"):
        data = json.loads((big / file).read_text())
        data.get("llm_config", data)["vocab_size"] = rows
        (big / file).write_text(json.dumps(data))
    tensors = load_file(big / WEIGHTS)
    width = golden_checkpoint.config.llm_config.hidden_size
    for name in (store.EMBEDDING, store.HEAD):
        tensors[name] = torch.zeros(rows, width)
    write_tensors(tensors, big / WEIGHTS)
    mapped = (big / WEIGHTS).stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big), str(CHECKPOINT)], capture_output=True, text=True, check=True
    )
    kept = mapped // 2
    assert int(done.stdout) < mapped + kept + 0.4 * mapped
