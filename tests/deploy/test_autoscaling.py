"""The elastic pool on Ray's autoscaler: nodes come with the replicas that need them, and go when these have left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from common.runtime import free_port


def test_nodes_come_and_go_with_the_replicas() -> None:
    scratch = Path(tempfile.mkdtemp(prefix="ra-", dir="/tmp"))  # pytest's paths are too long for Ray's sockets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(scratch),
    }
    script, log = Path(__file__).with_name("autoscaled_pool.py"), scratch / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), str(free_port()), str(scratch)],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    mine: set[psutil.Process] = set()
    try:
        while process.poll() is None:  # the test's own timeout bounds the wait
            with suppress(psutil.NoSuchProcess):
                mine.update(psutil.Process(process.pid).children(recursive=True))
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
        assert process.returncode == 0, log.read_text()[-3000:]
        assert json.loads((scratch / "seen.json").read_text()) == {"few": 1, "most": 3, "left": 1, "workers": 3}
    finally:
        process.kill()
        # The fake provider's nodes are children of the autoscaler, which ends without them.
        for left in psutil.wait_procs(list(mine), timeout=5)[1]:
            left.kill()
        shutil.rmtree(scratch, ignore_errors=True)
