"""Run checkpoints: everything --resume needs, written aside and renamed, verified by checksum when read.

`checkpoints/step-000020/` holds `policy/` (the released layout, usable by every command), `optimizer.safetensors`
(fp32 masters and Adam moments by parameter name, independent of rank count and ZeRO stage), `state.json`, with
`max_staleness` above 0 `in_flight/step-000021.parquet` (groups of steps to come, see common/records.py), and
`manifest.json` with the SHA-256 of every file. A directory without a manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint_files import CheckpointError, opened, read_json, read_tensors, sha256
from common.lora import plain_weights
from common.policy import OpenPolicy
from common.records import write_groups
from common.rundir import replacing_directory
from common.types import Group

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PARTIAL = ".partial"


def write(
    directory: Path,
    opened: OpenPolicy,
    weights: Mapping[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    in_flight: Mapping[int, Sequence[Group]] | None = None,
) -> None:
    """Writes one checkpoint and removes all of its siblings but the newest `keep` and the one with the highest
    `reward` in its state. On an error nothing is left of it, and every other one stays. weights: the policy's
    state dict, at least what optimizer holds no masters of; in_flight: finished groups of steps to come."""
    for left in directory.parent.glob(f"*{PARTIAL}"):  # by a process that was killed
        shutil.rmtree(left)
    with replacing_directory(directory) as aside:
        _write_files(aside, opened, weights, optimizer, state, in_flight or {})
    whole = written(directory.parent)
    best = max(whole, key=_reward)
    for old in whole[:-keep]:
        if old != best:
            try:
                _remove(old)
            except OSError as error:  # recovered from: the new one is whole, and the old one goes next time
                log.warning("%s could not be removed: %s", old, error)


def _reward(directory: Path) -> float:
    """Of a checkpoint's steps; the lowest of all where it has none or cannot be read."""
    try:
        reward = read_state(directory).get("reward")
    except CheckpointError:
        return -math.inf
    return reward if reward is not None and math.isfinite(reward) else -math.inf


def _remove(directory: Path) -> None:
    """Under another name first: what a kill leaves is then no checkpoint."""
    left = directory.with_name(directory.name + PARTIAL)
    directory.rename(left)
    shutil.rmtree(left)


def _write_files(
    aside: Path,
    opened: OpenPolicy,
    weights: Mapping[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    in_flight: Mapping[int, Sequence[Group]],
) -> None:
    for step, groups in in_flight.items():
        unscored = np.full((len(groups), len(groups[0].chains)), np.nan)
        write_groups(in_flight_file(aside, step), groups, unscored, {}, unscored, latents=True)
    # Masters rather than compute weights: a bf16 policy is saved without rounding.
    masters = {k.removeprefix("master."): v for k, v in optimizer.items() if k.startswith("master.")}
    opened.save(aside / "policy", dict(plain_weights(opened.policy, {**weights, **masters})))
    save_file(optimizer, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps(state, indent=2))
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(aside)): sha256(p) for p in files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))


def verify(directory: Path) -> dict[str, Any]:
    """Checks every file against the manifest and returns state.json. CheckpointError naming the file that differs."""
    manifest = read_json(directory / MANIFEST)
    for name, digest in manifest.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise CheckpointError(f"{directory / MANIFEST} names {name}, outside the checkpoint; do not trust it")
        if not path.exists() or sha256(path) != digest:
            raise CheckpointError(f"{path} is missing or damaged; resume from an earlier checkpoint")
    return read_state(directory)


def newest_whole(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint under `directory` whose files are all as written, with its state; damaged ones are
    passed over with a warning. None if there is none."""
    for candidate in reversed(written(directory)):
        try:
            return candidate, verify(candidate)
        except CheckpointError as error:
            log.warning("%s; going on from the one before", error)
    return None


def written(directory: Path) -> list[Path]:
    """Checkpoints that were written to their end, by step."""
    steps = {path: path.name.removeprefix("step-") for path in directory.glob("step-*")}
    whole = [path for path, step in steps.items() if step.isdecimal() and (path / MANIFEST).exists()]
    return sorted(whole, key=lambda path: int(steps[path]))


def in_flight_file(directory: Path, step: int) -> Path:
    """Where a checkpoint keeps the groups of a step to come that were finished before it."""
    return directory / "in_flight" / f"step-{step:06d}.parquet"


def read_state(directory: Path) -> dict[str, Any]:
    """state.json."""
    return read_json(directory / "state.json")


def trained(directory: Path) -> set[str]:
    """Names of the parameters that a checkpoint holds masters of."""
    with opened(directory / "optimizer.safetensors") as file:
        return {name.removeprefix("master.") for name in file.keys() if name.startswith("master.")}  # noqa: SIM118


def read_optimizer(directory: Path) -> dict[str, Tensor]:
    """fp32 masters and moments by name."""
    return read_tensors(directory / "optimizer.safetensors")


def identity(directories: Sequence[Path]) -> str:
    """SHA-256 over the weights and settings of a released checkpoint: the same for the same policy wherever it lies."""
    named = ""
    for directory in directories:
        files = sorted(p for p in directory.rglob("*") if p.suffix in {".safetensors", ".json"})
        named += "".join(f"{p.relative_to(directory)} {sha256(p)}\n" for p in files)
    return hashlib.sha256(named.encode()).hexdigest()
