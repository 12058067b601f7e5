"""Timelines of steps: written every so many steps, or of the next one when `unigrpo timeline RUN` asks for it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import ConfigError
from common.events import event
from common.rundir import RunDirectory
from common.timeline import chrome_trace, take_spans

if TYPE_CHECKING:
    from deploy.session import Session

log = logging.getLogger(__name__)
POLL_S = 0.2


def step_done(session: Session, step: int) -> None:
    """Writes what driver, replicas, rewards and ranks did since the step before, if it is wanted; forgets it if not."""
    every, request = session.config.recording.timeline_every, session.run.timeline_request
    spans = take_spans()
    if (every and step % every == 0) or request.exists():
        spans += session.learner.spans()
        try:
            path = session.run.write_json(session.run.timeline_file(step), chrome_trace(spans))
            request.unlink(missing_ok=True)
        except OSError as error:  # recovered from: a full disk must not end the run; a request waits for the next step
            log.warning("the timeline of step %d could not be written: %s", step, error)
            return
        event("timeline", step=step, path=str(path), spans=len(spans))


def ask(directory: Path, wait_s: float) -> Path:
    """Asks a live run for the timeline of the step that it is in and waits for it. ConfigError if the directory is no
    run, or if no step ends in time; the request then stays."""
    run = RunDirectory(directory).open()
    run.timelines.mkdir(exist_ok=True)
    run.timeline_request.touch()
    deadline = time.monotonic() + wait_s
    while run.timeline_request.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no step of {run.path} ended within {wait_s:.0f} s; the request stays, and the next one answers "
                "it. If the run is live, give the directory that its driver sees"
            )
        time.sleep(POLL_S)
    return max(run.timelines.glob("step-*.json"), key=lambda path: path.stat().st_mtime_ns)
