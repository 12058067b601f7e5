"""Events are whole lines of JSON, also after a kill, from threads, and on a full disk."""

from __future__ import annotations

import io
import json
import threading
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from journals import read_events

from common.events import EVENTS, event, journal


def test_an_event_is_a_line_in_the_file_and_in_the_log(tmp_path: Path) -> None:
    path, log = tmp_path / "events.jsonl", io.StringIO()
    event("step", step=0)  # nobody listens
    with journal(path, log):
        event("publish", version=3, seconds=np.float32(0.5), checksum="abc")
    event("step", step=1)
    (line,) = read_events(path)
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {"event": "publish", "version": 3, "seconds": 0.5, "checksum": "abc"}
    assert log.getvalue() == path.read_text()


def test_a_resumed_run_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    with journal(path):
        event("step", step=0)
    with path.open("a") as file:
        file.write('{"event": "st')
    with journal(path):
        event("step", step=1)
    assert [line["step"] for line in read_events(path)] == [0, 1]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def speak(replica: int) -> None:
        for _ in range(50):
            event("replica_lost", replica=f"rollout-{replica}", reason="x" * 200)

    with journal(path):
        threads = [threading.Thread(target=speak, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 200


def test_a_full_disk_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with journal(Path("/dev/full")):
        event("checkpoint", step=7)
    assert "not recorded" in caplog.text and '"step":7' in caplog.text


def test_an_event_must_be_described() -> None:
    with pytest.raises(KeyError, match=r"replica_gone is no event; describe it in common\.events\.EVENTS"):
        event("replica_gone")
    assert all(text.endswith(".") for text in EVENTS.values())
