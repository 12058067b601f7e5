"""The run directory: where everything a run leaves behind lies, and how it gets there whole.

::

    runs/NAME/
        config.yaml                            the resolved configuration
        parameters.txt                         which parameter is trained in which group, and at which rate
        metrics.jsonl                          one JSON object per step
        events.jsonl                           one JSON object per event, see common/events.py
        rollouts/step-000010-rank0.parquet     chains, see common/records.py
        checkpoints/step-000020/               whole once it holds manifest.json
        eval/step-000000.json                  result, beside it .parquet with the sample images
        tensorboard/
        lock                                   held by the driver that trains here
        control.json, status.json              what was asked of the live run, and its answer (deploy/control.py)
        timeline/step-000010.json              who did what when, see common/timeline.py
        report.html
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from common.config import ConfigError

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{6,})")


def _to_disk(path: Path) -> None:
    """A file's bytes, or a directory's names, would survive a power loss from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and moves it there on success: readers see the old file or the new
    one, never a part. Parent directories are made; on an error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        _to_disk(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path, new: bool = False) -> Iterator[Path]:
    """The same for a directory, which is there and empty when it is yielded. new: OSError if `path` is taken by the
    time that it is whole; else what was there is removed once the new one is in its place."""
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{which}.partial") for which in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for written in (*aside.rglob("*"), aside):
            _to_disk(written)
        if path.exists() and not new:
            path.rename(old)
        aside.rename(path)
        _to_disk(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def make_directory(path: Path, field: str) -> None:
    """Makes a directory if it is not there. ConfigError naming the field that asked for it if nothing can be written
    into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigError(
            f"{field}: nothing can be written into {path} ({error.strerror or error}); give another directory"
        ) from error


def dump_json(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8. NaN and infinities become null; numpy scalars and arrays become numbers and lists."""
    return to_json(value, indent=indent, inf_nan_mode="null", fallback=_from_numpy)


def _from_numpy(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON cannot hold")


def ends_whole(path: Path) -> bool:
    """Whether a file of lines ends with a whole one; so do none and an empty file."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class RunDirectory:
    """Paths and atomic writes of one run. Building it touches nothing; `create` or `open` it first."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def parameters(self) -> Path:
        return self.path / "parameters.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def control(self) -> Path:
        return self.path / "control.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def timelines(self) -> Path:
        return self.path / "timeline"

    @property
    def timeline_request(self) -> Path:
        return self.timelines / "request"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def rollout_file(self, step: int) -> Path:
        return self.rollouts / f"step-{step:06d}-rank0.parquet"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def evaluation_file(self, step: int) -> Path:
        return self.evaluations / f"step-{step:06d}.json"

    def samples_file(self, step: int) -> Path:
        return self.evaluations / f"step-{step:06d}.parquet"

    def timeline_file(self, step: int) -> Path:
        return self.timelines / f"step-{step:06d}.json"

    def create(self, config_yaml: str) -> RunDirectory:
        """Makes the directory with its config.yaml, both or neither. ConfigError if the path is taken."""
        taken = ConfigError(f"{self.path} exists already; give another run_name, or --resume to continue that run")
        if self.path.exists():
            raise taken
        try:
            with replacing_directory(self.path, new=True) as aside:
                (aside / "config.yaml").write_text(config_yaml, encoding="utf-8")
        except OSError as error:
            if self.path.exists():
                raise taken from error
            raise
        return self

    def configure(self, config_yaml: str) -> None:
        """What the run goes on with, such as more steps, takes the place of what it began with."""
        with replacing(self.config) as aside:
            aside.write_text(config_yaml, encoding="utf-8")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Nobody else trains in this directory meanwhile. ConfigError if somebody does; the end of a process, a kill
        too, lets go."""
        # A file that is open for writing: of a directory NFS would keep other processes of this machine out, no more.
        handle = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(
                f"{self.path} is trained by another process; wait for its end or stop it, then resume"
            ) from error
        except OSError as error:  # recovered from: not every shared file system has locks
            log.warning("%s cannot be locked (%s); see to it that no other driver trains in it", self.path, error)
        try:
            yield
        finally:
            os.close(handle)

    def open(self) -> RunDirectory:
        """Checks that a run is there. ConfigError if the directory or its config.yaml is missing."""
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} does not exist; correct the run's name, or start it without --resume")
        if not self.config.is_file():
            raise ConfigError(f"{self.path} has no config.yaml, so it is not a run directory; give another path")
        return self

    def clear_partial(self, folder: Path | None = None) -> None:
        """Removes what killed processes left half-written, in a folder or everywhere. Only while nobody writes."""
        for left in list((folder or self.path).rglob("*.partial")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def write_json(self, path: str | Path, value: Any) -> Path:
        """Writes JSON atomically, at `path` under the run directory (an absolute path stays as it is)."""
        target = self.path / path
        with replacing(target) as aside:
            aside.write_bytes(dump_json(value, indent=2) + b"\n")
        return target

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line and flushes it; NaN and infinities become null. A full disk costs the line, not the run."""
        try:
            if not ends_whole(self.metrics):
                self._rewrite_metrics(self.read_metrics())
            with self.metrics.open("ab") as file:
                file.write(dump_json(dict(row)) + b"\n")
        except OSError as error:  # recovered from: half a line is mended by the next one
            log.warning("%s: the metrics of step %s were not recorded: %s", self.metrics, row.get("step"), error)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows in order; none if there is no file. A broken last line, which a kill leaves, is ignored;
        ConfigError names any other broken line."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().splitlines()
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError(f"it holds a {type(row).__name__}")
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    break
                raise ConfigError(f"{self.metrics}, line {number} is not a JSON object ({error}); mend it") from error
            rows.append(row)
        return rows

    def rewind(self, step: int) -> None:
        """Forgets metrics and evaluations of what comes after the first `step` steps: a run that goes on from a
        checkpoint writes each step once, and what was measured of lost weights is not taken for its own. OSError on a
        full disk."""
        if self.metrics.exists():
            self._rewrite_metrics([row for row in self.read_metrics() if row["step"] < step])
        for path in self.evaluations.glob("step-*"):
            if (_step(path.stem) or 0) > step:
                path.unlink()

    def read_evaluations(self) -> dict[int, dict[str, Any]]:
        """Evaluation results by step, in order of steps. ConfigError naming a file that is broken."""
        found = {_step(path.stem): path for path in self.evaluations.glob("step-*.json")}
        results = {}
        for step in sorted(s for s in found if s is not None):
            try:
                results[step] = json.loads(found[step].read_bytes())
            except ValueError as error:
                raise ConfigError(f"{found[step]} is not valid JSON ({error}); restore or remove it") from error
        return results

    def _rewrite_metrics(self, rows: list[dict[str, Any]]) -> None:
        with replacing(self.metrics) as aside:
            aside.write_bytes(b"".join(dump_json(row) + b"\n" for row in rows))


def _step(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None
