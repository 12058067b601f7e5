"""Several runs side by side: `python -m deploy.results RUN [RUN ...]` prints the table of docs/results.md."""

from __future__ import annotations

import sys
from pathlib import Path

from common.rundir import RunDirectory
from deploy.evaluation import HEADLINES, PERCENT, Result, compare, mean


def first_and_last(run: RunDirectory) -> tuple[Result, Result]:
    """The evaluations before and after training. ValueError if there are not two."""
    results = list(run.read_evaluations().values())
    if len(results) < 2:
        raise ValueError(f"{run.path} has {len(results)} evaluations; a finished run has two")
    return results[0], results[-1]


def row(run: RunDirectory) -> str:
    """One run as a table row."""
    before, after = first_and_last(run)
    change = compare(before, after)["strict"]
    low, high = change["interval"]
    cells = [f"{PERCENT.value(before[key])} → {PERCENT.value(after[key])}" for key in HEADLINES]
    metrics = run.read_metrics()
    minutes = sum(step["time/step_s"] for step in metrics) / 60
    return (
        f"| {run.name} | {' | '.join(cells)} | {100 * change['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] "
        f"| {len(metrics)} | {minutes:.1f} |"
    )


def tasks(runs: list[RunDirectory]) -> list[str]:
    """Strict accuracy by task, mean over runs."""
    pairs = [first_and_last(run) for run in runs]
    lines = ["| task | before | after |", "|---|---|---|"]
    for tag in pairs[0][0]["by_tag"]:
        sides = ([pair[side]["by_tag"][tag]["strict"] for pair in pairs] for side in (0, 1))
        before, after = (mean([value for value in side if value is not None]) for side in sides)
        lines.append(f"| {tag} | {PERCENT.value(before)} | {PERCENT.value(after)} |")
    return lines


def main(paths: list[str]) -> None:
    """Prints the tables."""
    runs = [RunDirectory(Path(path)).open() for path in paths]
    before, _ = first_and_last(runs[0])
    print(
        f"{before['n_prompts']} held-out prompts x {before['images_per_prompt']} images; "
        "intervals: 95 % bootstrap over prompts.\n"
    )
    print(f"| run | {' | '.join(HEADLINES.values())} | Change of strict, points | Steps | Minutes of training |")
    print("|---" * (len(HEADLINES) + 4) + "|")
    for run in runs:
        print(row(run))
    print("\nStrict accuracy by task, mean over the runs:\n")
    print("\n".join(tasks(runs)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m deploy.results RUN [RUN ...]")
    main(sys.argv[1:])
