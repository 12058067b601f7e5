"""`python -m deploy.bench.overlap`: the time of a step with rollouts before the update and beside it, in one run.

One replica and one learner rank, each with a core of its own, so that there is something to overlap.
"""

from __future__ import annotations

import tempfile

import numpy as np

from common.recipe import load_config
from deploy.loop import train
from deploy.session import open_session

STEPS, WARM = 14, 2
KEYS = ("time/step_s", "time/rollout_s", "time/update_s", "time/sync_s", "rollout/staleness")


def measure(staleness: int) -> dict[str, float]:
    """Medians over the steps of a short run of the default recipe, the first ones left out."""
    with tempfile.TemporaryDirectory() as runs:
        overrides = ["rollout.replicas=1", "learner.ranks=1", "rollout.groups_per_call=2", "evaluation.prompts=7"]
        run = [f"steps={STEPS}", f"runs_dir={runs}", f"run_name=overlap-{staleness}", f"max_staleness={staleness}"]
        with open_session(load_config("shapes", [*overrides, *run])) as session:
            rows = train(session).read_metrics()[WARM:]
    return {key: float(np.median([row[key] for row in rows])) for key in KEYS}


def main() -> None:
    """Prints the table."""
    print("| max_staleness | step | waiting for rollouts | update | sync | mean staleness |")
    print("|---|---|---|---|---|---|", flush=True)
    for staleness in (0, 1):
        step, *phases, behind = measure(staleness).values()
        print(f"| {staleness} | {step:.2f} s | {' | '.join(f'{s:.2f} s' for s in phases)} | {behind:.2f} |", flush=True)


if __name__ == "__main__":
    main()
