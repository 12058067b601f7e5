"""The driver of a chaos run: trains, or goes on, and at the end compares the weights of replicas and learner."""

from __future__ import annotations

import sys
import time
from typing import Any

import ray

from common.recipe import load_config
from deploy.chaos.check import AUDIT
from deploy.loop import train
from deploy.session import Session, open_session


def audit(session: Session) -> dict[str, Any]:
    """The checksums of the learner's weights and of what every replica holds, computed anew from its tensors."""
    manifest = session.learner.publish().manifest
    wait_s = session.config.rollout.deadline_s
    deadline = time.monotonic() + wait_s
    while session.rollout.serving < session.config.replica_bounds[0] or "loading" in _states(session):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all replicas came back within {wait_s:.0f} s: {session.rollout.states()}")
        time.sleep(0.2)
    held = {r.name: ray.get(r.handle.checksum.remote(manifest), timeout=wait_s) for r in session.rollout.replicas}
    return {"learner": manifest.checksum, "replicas": held}


def _states(session: Session) -> set[str]:
    return set(session.rollout.states().values())


def main() -> None:
    """`python -m deploy.chaos.driver RECIPE`: resumes the recipe's run if there is one."""
    config = load_config(sys.argv[1])
    with open_session(config, resume=config.directory.exists()) as session:
        run = train(session)
        run.write_json(AUDIT, audit(session))


if __name__ == "__main__":
    main()
