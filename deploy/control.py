"""Changing a live run through its directory: `unigrpo scale` leaves a request there, the driver takes it up.

Driver, learner and whoever operates a run share the run directory already, on one machine as on a cluster; so this
needs no address and no open port, and who may write there may scale. control.json holds the request last made; it
holds for a resumed run too. status.json is the driver's answer: the request it took up and what each replica does.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from pathlib import Path

from common.config import ConfigError
from common.rundir import RunDirectory
from rollout.pool import RolloutPool

log = logging.getLogger(__name__)
POLL_S = 0.5
ANSWER_S = 30.0


class Control:
    """The driver's end."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._seen = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.replicas = self._request()
        """Rollout replicas that were asked for before, None if nobody did."""

    def follow(self, pool: RolloutPool) -> None:
        """Takes up requests, in the background, until `close`."""
        self._thread = threading.Thread(target=self._watch, args=(pool,), name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=30)

    def _request(self) -> int | None:
        """A number of replicas that was not seen before."""
        try:
            request = json.loads(self._run.control.read_bytes())
            identity, replicas = str(request["id"]), int(request["rollout_replicas"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:  # recovered from: a hand-written file may be wrong
            log.warning("%s is not a request (%s); `unigrpo scale` writes it", self._run.control, error)
            return None
        if identity == self._seen:
            return None
        self._seen = identity
        return max(1, replicas)

    def _watch(self, pool: RolloutPool) -> None:
        written: dict[str, object] = {}
        while not self._stop.wait(POLL_S):
            try:
                if (replicas := self._request()) is not None:
                    log.info("%d rollout replicas are asked for", replicas)
                    pool.scale(replicas)
                status: dict[str, object] = {"request": self._seen, "replicas": pool.states()}
                if status != written:
                    self._run.write_json(self._run.status, status)
                    written = status
            except OSError as error:  # recovered from: a full or slow disk must not end the run
                log.warning("%s: %s", self._run.status, error)


def scale(directory: Path, replicas: int, answer_s: float = ANSWER_S) -> dict[str, str]:
    """Asks a live run for a number of rollout replicas and waits until its driver has taken it up. What each replica
    does, by name. ConfigError if the directory is no run, or if no driver answers."""
    run = RunDirectory(directory).open()
    identity = uuid.uuid4().hex
    run.write_json(run.control, {"id": identity, "rollout_replicas": replicas})
    deadline = time.monotonic() + answer_s
    while time.monotonic() < deadline:
        if run.status.exists():
            status = json.loads(run.status.read_bytes())
            if status["request"] == identity:
                return status["replicas"]
        time.sleep(POLL_S / 5)
    raise ConfigError(
        f"no driver of {run.path} answered within {answer_s:.0f} s; the request stays and holds once the run goes on "
        f"with --resume. If the run is live, give the directory that its driver sees"
    )
