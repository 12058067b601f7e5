"""What happens in a run, one JSON object per line: in events.jsonl of the run and, in a Ray job, in the job's log.

Any room says `event("replica_lost", replica="rollout-1", reason="...")`. Where nobody has opened a journal, as in an
actor or in most tests, that does nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from common.rundir import dump_json, ends_whole

EVENTS: dict[str, str] = {
    "run_started": "The driver begins to start its actors; step is the first to be trained.",
    "run_ended": "The driver ends; outcome is done, or the kind of error, with its reason.",
    "step": "A training step is done, with its reward, its seconds and its chains that could not be scored.",
    "publish": "Every replica that serves has acknowledged a weight version, with its checksum.",
    "replica_ready": "A rollout replica serves: at the start, after a restart, or new.",
    "replica_lost": "A rollout replica died, hung or held wrong weights; its groups go to another.",
    "rollout_retried": "Groups whose generation failed, hung or was lost with its replica are generated again.",
    "replica_left": "A rollout replica left because fewer are wanted.",
    "learner_lost": "A learner rank died, hung or failed; the learner is rebuilt from the last checkpoint.",
    "learner_ready": "The learner was rebuilt; step is the one it goes on from, again.",
    "reward_lost": "A reward actor died or hung; Ray restarts it.",
    "reward_ready": "A reward actor that was lost scores again.",
    "reward_masked": "A group could not be scored by a reward after all tries; its chains are left out of the update.",
    "checkpoint": "A checkpoint is copied and is being written; it is whole once it holds manifest.json.",
    "checkpoint_failed": "A checkpoint could not be written; the ones before stay.",
    "record_failed": "The groups of a step could not be written; training goes on.",
    "evaluation": "The held-out prompts were evaluated.",
    "timeline": "The trace of a step was written.",
}

_journal: _Journal | None = None
log = logging.getLogger(__name__)


def event(kind: str, **about: Any) -> None:
    """Records what happened, if a journal is open. KeyError for a kind that EVENTS does not describe."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **about}
    if kind not in EVENTS:
        raise KeyError(f"{kind} is no event; describe it in common.events.EVENTS")
    if _journal:
        _journal.write(line)


@contextmanager
def journal(path: Path, also: TextIO | None = None) -> Iterator[None]:
    """Opens the journal of this process: events are appended to `path`, and written to `also`."""
    global _journal
    with path.open("ab", buffering=0) as file:
        if not ends_whole(path):
            file.write(b"\n")  # a kill has left half a line
        _journal = _Journal(file, also)
        try:
            yield
        finally:
            _journal = None


class _Journal:
    def __init__(self, file: Any, also: TextIO | None) -> None:
        self._file, self._also = file, also
        self._lock = threading.Lock()  # pools speak from threads of their own

    def write(self, line: Mapping[str, Any]) -> None:
        data = dump_json(dict(line)) + b"\n"
        try:
            with self._lock:
                self._file.write(data)
                if self._also:
                    self._also.write(data.decode())
                    self._also.flush()
        except OSError as error:  # recovered from: a full disk must not end the run over its diary
            log.warning("an event was not recorded (%s): %s", error, data.decode().strip())
