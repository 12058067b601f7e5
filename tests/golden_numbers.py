"""The recorded numbers: where they are, how they are read, and how close to them is close enough.

Another recording of the same layout is used with UNIGRPO_GOLDEN=directory; every size comes from its files.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

GOLDEN = Path(os.environ.get("UNIGRPO_GOLDEN") or Path(__file__).with_name("golden"))
CHECKPOINT = GOLDEN / "ckpt"
# What the README of the recording suggests for fp32; SQUARES for values that are squared errors, COMBINED for guided
# velocities and what follows from them.
ATOL, RTOL, SQUARES, COMBINED = 5e-5, 1e-4, 2e-4, 2e-4


READ: dict[str, set[str]] = {}
"""File -> the arrays that tests have asked for by name so far."""


class Arrays(dict[str, Any]):
    """The arrays of one file. Asking for one by name is noted in READ; going through all of them is not."""

    def __init__(self, file: str, arrays: dict[str, Any]) -> None:
        super().__init__(arrays)
        self.read = READ.setdefault(file, set())

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


@cache
def golden(name: str) -> dict[str, NDArray[Any]]:
    """All arrays of one file, e.g. "bagel/text.npz"."""
    with np.load(GOLDEN / name) as file:
        return Arrays(name, {key: file[key] for key in file.files})


def tensors(name: str) -> dict[str, torch.Tensor]:
    """The same as tensors, of their own memory."""
    return Arrays(name, {key: tensor(array) for key, array in golden(name).items()})


def named(file: str, pattern: str) -> list[str]:
    """What a pattern's one group is in the names of a file's arrays that fit it as a whole, each once."""
    found = (re.fullmatch(pattern, name) for name in golden(file))
    return list(dict.fromkeys(match[1] for match in found if match))


@cache
def described(folder: str) -> dict[str, Any]:
    """What the recording says of a folder's files and arrays."""
    return json.loads((GOLDEN / folder / "README.json").read_text())


def meaning(file: str, array: str) -> str:
    """One array in words, with the call that made it, e.g. meaning("bagel/velocity.npz", "cfg_x")."""
    folder, name = file.split("/")
    about = described(folder)[name]["arrays"][array]
    return f"{about['meaning']} | {about.get('call', '')}"


def stated(text: str, name: str) -> float:
    """The number behind a name among those words, e.g. of "clip" in "clipped policy loss (clip 3e-4)"."""
    found = re.search(rf"\b{name} ([0-9.]+(?:e-?\d+)?)", text)
    assert found, f"the recording does not say its {name}: {text}"
    return float(found[1])


def settings(file: str, array: str) -> dict[str, Any]:
    """The guidance settings among those words; empty if there are none."""
    found = re.search(r"\{.*?\}", meaning(file, array))
    return json.loads(found[0]) if found else {}


def tensor(array: Any) -> torch.Tensor:
    """An array as a tensor of its own memory."""
    return torch.tensor(np.asarray(array))


def close(found: Any, wanted: Any, atol: float = ATOL, rtol: float = RTOL) -> None:
    """Asserts equal shapes and values within tolerance."""
    found = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    wanted = wanted.detach().cpu().numpy() if isinstance(wanted, torch.Tensor) else np.asarray(wanted)
    assert found.shape == wanted.shape, f"shape {found.shape}, not {wanted.shape}"
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=rtol)
