"""A run's report: one HTML file that needs nothing beside it, for a run that is finished or not."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

from common.config import ConfigError
from common.metrics import METRICS
from common.rundir import RunDirectory, replacing
from deploy.evaluation import HEADLINES, PERCENT, Result, Sample, compare, headlines, table, unit

SAMPLES = pa.schema(
    {
        "prompt": pa.string(),
        "tag": pa.string(),
        "chain": pa.int32(),
        "reasoning": pa.string(),
        "png": pa.binary(),
        "strict": pa.float32(),
        "partial": pa.float32(),
        "reasoning_correct": pa.bool_(),
        "ta": pa.float32(),
    }
)
"""eval/step-*.parquet: one row per image. strict is NaN if unscored, reasoning_correct null if it cannot be judged."""

Row = dict[str, Any]

_INK = "#7f7f80"  # replaced by currentColor, so that figures follow the page's light or dark colours
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}
_CURVES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Gradient norms", "log", ("grad_norm/reasoning", "grad_norm/denoising")),
    ("Clip fractions", "linear", ("text/clip_fraction", "image/clip_fraction")),
    ("Reasoning entropy (nats)", "linear", ("text/entropy",)),
    ("Reasoning length (tokens)", "linear", ("text/tokens_mean",)),
    ("Velocity error against the reference", "linear", ("image/velocity_mse",)),
    ("Log-prob gap of learner and rollout (nats)", "log", ("text/logprob_diff_rollout",)),
)
_TIMES = ("time/rollout_s", "time/reward_s", "time/update_s", "time/sync_s")


def write_samples(path: Path, rows: Sequence[Sample]) -> None:
    """Writes evaluated images atomically; the report shows every one of them, in this order."""
    with replacing(path) as aside:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SAMPLES), aside)


def read_samples(path: Path) -> list[Sample]:
    """What `write_samples` wrote. ConfigError if it is broken."""
    try:
        return [Sample(**row) for row in pq.read_table(path, schema=SAMPLES).to_pylist()]
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path} is not a whole Parquet file ({error}); restore or remove it") from error


def write_report(run: RunDirectory) -> Path:
    """Writes report.html from what the run directory holds, and returns its path.

    The first evaluation is "before"; the last one, if it is another, "after". Prompts and reasoning are untrusted
    text and are escaped. ConfigError if there is no run.
    """
    run.open()
    config_text = run.config.read_text(encoding="utf-8")
    rows, evaluations = run.read_metrics(), run.read_evaluations()
    steps = list(evaluations)
    before = evaluations[steps[0]] if steps else None
    after = evaluations[steps[-1]] if len(steps) > 1 else None
    shown = (steps[0], steps[-1])[: len(steps)] if steps else ()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        name=run.name,
        story=_story(yaml.safe_load(config_text) or {}, rows, before, after),
        before=before,
        after=after,
        results=table(before, after) if before else [],
        n_tags=len({**before["by_tag"], **(after or before)["by_tag"]}) if before else 0,
        figures=_figures(rows, evaluations),
        prompts=_prompts([read_samples(run.samples_file(s)) if run.samples_file(s).exists() else [] for s in shown]),
        config=config_text,
    )
    with replacing(run.report) as aside:
        aside.write_text(html, encoding="utf-8")
    return run.report


def _story(config: dict[str, Any], rows: list[Row], before: Result | None, after: Result | None) -> str:
    """One paragraph on what happened."""
    planned, data, model = config.get("steps"), config.get("data") or {}, config.get("model") or {}
    done = int(rows[-1]["step"]) + 1 if rows else 0
    parts = [f"{done} of {planned} training steps are done" if planned is not None else f"{done} training steps"]
    if "prompts_per_step" in data and "group_size" in data:
        parts[0] += f", each on {data['prompts_per_step']} prompts with {data['group_size']} chains"
    if "path" in model:
        parts[0] += f", of the model {model['path']}"
    if seconds := sum(row.get("time/step_s") or 0.0 for row in rows):
        parts.append(f"They took {seconds / 60:.1f} minutes")
    if before is None:
        parts.append("There is no evaluation yet")
    elif after is None:
        told, name = unit(before, "strict"), headlines(before)["strict"]
        parts.append(
            f"{name} on {before['n_prompts']} held-out prompts is {told.value(before['strict'])} before training; "
            "there is no evaluation after training yet"
        )
    else:
        told, name, versus = unit(before, "strict"), headlines(before)["strict"], compare(before, after)
        change = versus["strict"]
        low, high = map(told.change, change["interval"])
        parts.append(
            f"{name} on {versus['n_prompts']} held-out prompts was {told.value(change['before'])} before training and "
            f"{told.value(change['after'])} after it, a difference of {told.change(change['difference'])}"
            f"{' points' if told is PERCENT else ''} (95 % interval {low} to {high})"
        )
    return ". ".join(parts) + "."


def _prompts(sides: list[list[Sample]]) -> list[dict[str, Any]]:
    """Samples of before (and after) by prompt: {prompt, tag, chains: [[before, after], ...]}, a missing one None."""
    found = [{(s.tag, s.prompt, s.chain): s for s in side} for side in sides]
    keys = list(dict.fromkeys(key for side in found for key in side))
    order = {key[:2]: place for place, key in reversed(list(enumerate(keys)))}
    keys.sort(key=lambda key: (order[key[:2]], key[2]))
    return [
        {
            "tag": tag,
            "prompt": prompt,
            "chains": [[_shown(side[key]) if key in side else None for side in found] for key in of_prompt],
        }
        for (tag, prompt), of_prompt in groupby(keys, key=lambda key: key[:2])
    ]


def _shown(sample: Sample) -> dict[str, Any]:
    with Image.open(io.BytesIO(sample.png)) as image:
        small = max(image.size) <= 128
    return {
        "image": "data:image/png;base64," + b64encode(sample.png).decode("ascii"),
        "small": small,
        "reasoning": sample.reasoning,
        "image_right": sample.right,
        "reasoning_right": sample.reasoning_correct,
    }


def _column(rows: list[Row], key: str) -> np.ndarray:
    """One metric over the rows [S], NaN where it is missing."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], np.float64)


def _figures(rows: list[Row], evaluations: dict[int, Result]) -> list[tuple[str, Markup]]:
    """Titles and inline SVGs of everything that there are at least two points of."""
    with matplotlib.rc_context(_STYLE):
        drawn = [_accuracy_figure(evaluations), _reward_figure(rows), *(_lines(rows, *c) for c in _CURVES), _time(rows)]
    return [figure for figure in drawn if figure is not None]


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    return figure, axes


def _svg(title: str, figure: Figure, axes: Any) -> tuple[str, Markup]:
    """The title and the figure as SVG for the middle of a page: no prolog, no ids shared with other figures."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8, handlelength=1, columnspacing=1)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Safe as markup: matplotlib escapes the texts it draws.
    return title, Markup(svg)


def _accuracy_figure(evaluations: dict[int, Result]) -> tuple[str, Markup] | None:
    if len(evaluations) < 2:
        return None
    figure, axes = _axes()
    steps, values = list(evaluations), np.array([result["strict"] for result in evaluations.values()])
    interval = np.array([result["strict_interval"] for result in evaluations.values()]).T
    axes.errorbar(steps, values, np.abs(interval - values), marker="o", capsize=3)
    name = headlines(next(iter(evaluations.values())))["strict"]
    if name == HEADLINES["strict"]:
        axes.set_ylim(0, 1)
    return _svg(f"Held-out: {name[0].lower()}{name[1:]}", figure, axes)


def _reward_figure(rows: list[Row]) -> tuple[str, Markup] | None:
    mean, std, steps = (_column(rows, key) for key in ("reward/mean", "reward/std", "step"))
    if np.isfinite(mean).sum() < 2:
        return None
    figure, axes = _axes()
    axes.plot(steps, mean, label="mean")
    axes.fill_between(steps, mean - std, mean + std, alpha=0.2, linewidth=0)
    scorers = sorted({key for row in rows for key in row if key.startswith("reward/")} - METRICS.keys())
    for key in scorers if len(scorers) > 1 else ():
        axes.plot(steps, _column(rows, key), linewidth=1, label=key.removeprefix("reward/"))
    return _svg("Training reward (mean and standard deviation)", figure, axes)


def _lines(rows: list[Row], title: str, scale: str, keys: tuple[str, ...]) -> tuple[str, Markup] | None:
    columns = {key: column for key in keys if np.isfinite(column := _column(rows, key)).sum() > 1}
    if not columns:
        return None
    figure, axes = _axes()
    for key, column in columns.items():
        axes.plot(_column(rows, "step"), column, linewidth=1.2, label=key)
    if scale == "log" and any((column > 0).any() for column in columns.values()):
        axes.set_yscale("log")
        # The default formatter needs math parsing, which must stay off for names that hold a dollar sign.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    return _svg(title, figure, axes)


def _time(rows: list[Row]) -> tuple[str, Markup] | None:
    parts = np.nan_to_num([_column(rows, key) for key in _TIMES])
    if len(rows) < 2 or not parts.any():
        return None
    figure, axes = _axes()
    rest = np.nan_to_num(_column(rows, "time/step_s") - parts.sum(0)).clip(0)
    labels = [key.removeprefix("time/").removesuffix("_s") for key in _TIMES]
    axes.stackplot(_column(rows, "step"), *parts, rest, labels=[*labels, "other"], alpha=0.75, linewidth=0)
    return _svg("Time of a step (s)", figure, axes)
