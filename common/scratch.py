"""Directories for a while, which are gone afterwards even if the process is killed meanwhile."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "unigrpo-scratch-"


@contextmanager
def scratch(base: Path | None = None) -> Iterator[Path]:
    """A new directory under `base` (the system's temporary directory if None), removed on the way out.

    A process that is killed leaves its directory but not the lock it held on it; the next one to come removes it.
    """
    base = base or Path(tempfile.gettempdir())
    for left in base.glob(f"{PREFIX}*"):
        with suppress(OSError), (left / "lock").open("rb") as lock:  # OSError: its owner lives, or another removes it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    try:
        with (directory / "new").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / "new").rename(directory / "lock")  # nobody ever sees the file without the lock
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
