"""A checkpoint's files: JSON, and safetensors in one file or in shards with an index, which are read through a memory
map and checked by their headers. Imports torch only to write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from common.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARD_BYTES = 5 << 30
FINITE_AT_ONCE = 1 << 24
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What a zip archive (torch.save) and a bare pickle begin with.
_PICKLED = (b"PK\x03\x04", b"\x80")
_REMEDY = "convert it to safetensors on the machine that made it"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message names the file, the entry and the remedy."""


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is missing; copy it again, or give another checkpoint")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when missing or broken."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise _missing(path) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON (line {error.lineno}: {error.msg})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); copy it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not an object")
    return data


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped. CheckpointError if it is missing, truncated or something else."""
    if not path.exists():
        raise _missing(path)
    with path.open("rb") as file:
        # A safetensors header is JSON behind its length in 8 bytes, which may look like the start of a pickle.
        start = file.read(9)
        if start.startswith(_PICKLED) and start[8:] != b"{":
            raise CheckpointError(f"{path} is a pickle, which can run code, and is not read; {_REMEDY}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped. CheckpointError if missing or truncated."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def check_finite(tensors: Iterable[tuple[str, Tensor]], files: Mapping[str, Path], where: Path) -> None:
    """CheckpointError naming the first tensor with a NaN or an infinite number, and its file, or else `where`: a policy
    with one draws noise, which scorers take for images. In parts, so that little memory is needed beside a tensor."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.itemsize == 1:  # torch cannot ask numbers of 8 bits
            continue
        if not all(part.isfinite().all() for part in tensor.flatten().split(FINITE_AT_ONCE)):
            raise CheckpointError(
                f"{files.get(name, where)}: tensor {name} has NaN or infinite numbers (as {str(tensor.dtype)[6:]}); "
                "copy it again, or give another checkpoint"
            )


@dataclass(frozen=True)
class TensorFiles:
    """Tensors by name in one file or several: path is the file or the index that errors name; shapes and files by
    tensor. Nothing but headers has been read."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Path]

    @classmethod
    def find(cls, directory: Path, *names: str) -> TensorFiles:
        """The first of names ("ema.safetensors") that is there, whole or as shards ("ema.safetensors.index.json").

        CheckpointError if none is there, if the index names a file or a tensor that is not, or if a file is damaged.
        """
        for name in names:
            if (directory / name).exists():
                return cls._of(directory / name, [directory / name])
            index = directory / f"{name}.index.json"
            if index.exists():
                return cls._sharded(index)
        pickles = sorted(path for path in directory.glob("*") if path.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{directory / names[0]} is missing; {pickles[0].name} beside it is a pickle, which can run code, and "
                f"is not read; {_REMEDY}"
            )
        raise _missing(directory / names[0])

    @classmethod
    def _sharded(cls, index: Path) -> TensorFiles:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files; copy it again")
        for tensor, file in where.items():
            if Path(file).name != file or Path(file).suffix != ".safetensors":
                raise CheckpointError(
                    f"{index}: tensor {tensor} is said to be in {file!r}; shards are safetensors files beside the index"
                )
            if not (index.parent / file).exists():
                raise CheckpointError(f"{index}: shard {file} with tensor {tensor} is missing; copy it again")
        found = cls._of(index, [index.parent / file for file in sorted(set(where.values()))])
        for tensor, file in where.items():
            if found.files.get(tensor) != index.parent / file:
                raise CheckpointError(f"{index}: tensor {tensor} is not in {file}, where the index says it is")
        return found

    @classmethod
    def _of(cls, path: Path, files: list[Path]) -> TensorFiles:
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, Path] = {}
        for file in files:
            with opened(file) as header:
                for name in header.keys():  # noqa: SIM118 (not a dict)
                    if name in places:
                        raise CheckpointError(f"{path}: tensor {name} is in {places[name].name} and in {file.name}")
                    shapes[name] = tuple(header.get_slice(name).get_shape())
                    places[name] = file
        return cls(path, shapes, places)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """CheckpointError naming the first missing, extra or misshapen tensor."""
        missing, extra = sorted(wanted.keys() - self.shapes.keys()), sorted(self.shapes.keys() - wanted.keys())
        if missing:
            raise CheckpointError(f"{self.path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
        if extra:
            raise CheckpointError(
                f"{self.files[extra[0]]}: tensor {extra[0]} is not part of the configured model ({len(extra)} extra)"
            )
        for name, shape in wanted.items():
            if self.shapes[name] != tuple(shape):
                raise CheckpointError(
                    f"{self.files[name]}: tensor {name} has shape {self.shapes[name]}, the config says {tuple(shape)}"
                )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of these names, file by file, each a view of the memory map: copy it, or keep the map alive."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, inside in by_file.items():
            with opened(path) as file:
                for name in inside:
                    yield name, file.get_tensor(name)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype | None = None
) -> None:
    """One file, or, above shard_bytes, shards named after it with an index; one shard at a time is in host memory.
    dtype: to convert to; without it every tensor keeps its own."""
    from safetensors.torch import save_file

    from common.weights import cut

    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
    shards = cut(sizes, shard_bytes) or [[]]
    files = [path.name]
    if len(shards) > 1:
        files = [f"{path.stem}-{i + 1:05d}-of-{len(shards):05d}{path.suffix}" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2))
    for file, names in zip(files, shards, strict=True):
        save_file(
            {name: tensors[name].detach().to("cpu", dtype or tensors[name].dtype).contiguous() for name in names},
            path.with_name(file),
            metadata={"format": "pt"},
        )
