"""Scratch directories: gone afterwards, and gone with the next one after a kill, but never while they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.scratch import scratch

HOLD = """
import sys, time
from pathlib import Path
from common.scratch import scratch
with scratch(Path(sys.argv[1])) as directory:
    (directory / "big").write_text("weights")
    print(directory, flush=True)
    time.sleep(600)
"""


def test_scratch_is_removed_once_nobody_uses_it(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    with scratch(tmp_path) as mine:
        assert mine.parent == tmp_path and mine != theirs
        assert (theirs / "big").exists(), "its process lives"
    assert not mine.exists()
    other.kill()
    other.wait()
    assert theirs.exists()
    with scratch(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert not list(tmp_path.iterdir())
