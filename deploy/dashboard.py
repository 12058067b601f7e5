"""The Grafana dashboard, made from the table of metrics: `make dashboard` writes deploy/monitoring/grafana.json.

Every metric has a place: those that PANELS does not name go to a last row, one panel each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import REPOSITORY
from common.metrics import METRICS, gauge

FILE = REPOSITORY / "deploy" / "monitoring" / "grafana.json"

Panel = tuple[str, str, tuple[str, ...]]

PANELS: dict[str, tuple[Panel, ...]] = {
    "Progress": (
        ("Step", "none", ("step", "weights/version")),
        ("Reward", "none", ("reward/mean", "reward/std")),
        ("Reward by scorer", "none", ("reward/<scorer>",)),
        ("Images and tokens per second", "none", ("rollout/images_per_s", "rollout/tokens_per_s")),
    ),
    "Where the time goes": (
        ("Phases of a step", "s", ("time/rollout_s", "time/reward_s", "time/update_s", "time/sync_s", "time/step_s")),
        ("Inside a replica and a rank", "s", ("time/reasoning_s", "time/drawing_s", "time/update_math_s")),
        ("Weight publishing", "s", ("weights/sync_s",)),
        ("Share that is not model mathematics", "percentunit", ("time/overhead_fraction",)),
    ),
    "Actors": (
        ("Rollout replicas", "none", ("rollout/replicas", "rollout/replicas_wanted")),
        (
            "What rollout replicas do",
            "none",
            ("rollout/starting", "rollout/idle", "rollout/generating", "rollout/loading", "rollout/leaving"),
        ),
        ("Groups that wait", "none", ("rollout/queued_groups", "reward/queued_groups")),
        ("Reward actors", "none", ("reward/actors",)),
        ("Restarts", "none", ("rollout/restarts", "reward/restarts", "learner/rebuilds")),
        ("Staleness", "none", ("rollout/staleness", "rollout/stale_groups", "rollout/continued_groups")),
    ),
    "Learning": (
        ("Ratios", "none", ("text/ratio_mean", "image/ratio_mean")),
        ("Log ratio of the denoising steps", "none", ("image/log_ratio_abs",)),
        ("Clipped", "percentunit", ("text/clip_fraction", "image/clip_fraction")),
        ("Gradient norms", "none", ("grad_norm/reasoning", "grad_norm/denoising")),
        ("Advantage", "none", ("advantage/abs_mean",)),
        ("Reasoning", "none", ("text/tokens_mean", "text/entropy")),
        ("Reasoning cut at the limit", "percentunit", ("text/truncated",)),
        ("Distance to the reference and the old policy", "none", ("image/velocity_mse", "image/kl_old")),
    ),
    "Faults": (
        ("Rollout against learner", "none", ("text/logprob_diff_rollout", "image/velocity_diff_rollout")),
        (
            "Chains and groups without a signal",
            "none",
            ("reward/masked_chains", "reward/zero_variance_groups", "reward/refilled_groups"),
        ),
        ("Updates and scores that are not finite", "none", ("loss/nonfinite", "reward/nonfinite")),
        ("Groups made again, checkpoints not written", "none", ("rollout/rerun_groups", "checkpoint/failures")),
    ),
}

COLUMNS, WIDTH, HEIGHT = 3, 8, 8


def dashboard() -> dict[str, Any]:
    """What Grafana imports. Its variables choose the data source and the runs."""
    named = {key for row in PANELS.values() for _, _, keys in row for key in keys}
    others = tuple((key, "none", (key,)) for key in METRICS if key not in named)
    rows = {**PANELS, **({"More": others} if others else {})}
    run = {
        "name": "run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": "label_values(ray_unigrpo_step, run)", "refId": "runs"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
    }
    return {
        "uid": "unigrpo",
        "title": "UniGRPO",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}, run]},
        "panels": list(_panels(rows)),
    }


def _panels(rows: dict[str, tuple[Panel, ...]]) -> Iterator[dict[str, Any]]:
    top = number = 0
    for title, panels in rows.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
            "panels": [],
        }
        top += 1
        for place, (name, unit, keys) in enumerate(panels):
            number += 1
            x, y = place % COLUMNS * WIDTH, top + place // COLUMNS * HEIGHT
            yield {
                "id": number,
                "type": "timeseries",
                "title": name,
                "description": " ".join(METRICS[key] for key in keys),
                "datasource": {"type": "prometheus", "uid": "${source}"},
                "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
                "targets": [_target(key, chr(ord("A") + i)) for i, key in enumerate(keys)],
            }
        top += -(-len(panels) // COLUMNS) * HEIGHT


def _target(key: str, ref: str) -> dict[str, str]:
    name, tags = gauge(key.replace("<scorer>", "any"))
    legend = "{{run}} " + ("{{scorer}}" if tags else key)
    return {"refId": ref, "expr": f'ray_{name}{{run=~"$run"}}', "legendFormat": legend}


def render() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main(path: Path = FILE) -> None:
    path.write_text(render())


if __name__ == "__main__":
    main()
