"""From scored held-out images to numbers: accuracies with bootstrap intervals, and the comparison of two checkpoints.

Images of one prompt are not independent, so intervals resample prompts, not images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Result = dict[str, Any]

HEADLINES = {
    "strict": "Strict accuracy",
    "task_mean": "Mean of task accuracies",
    "ta": "TA-like score",
    "partial": "Partial score",
    "reasoning_accuracy": "Reasoning accuracy",
    "image_given_reasoning": "Image accuracy given right reasoning",
}
"""Keys of a result that are single numbers in [0, 1] (or None), with their names for people. task_mean is GenEval's
overall score: every task counts alike, however many prompts it has."""

REWARDS = {
    "strict": "Mean reward",
    "task_mean": "Mean of task rewards",
    "image_given_reasoning": "Mean reward given right reasoning",
}
"""What these are where no scorer says whether an image is right: means of the reward, of any range."""

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Sample:
    """One held-out image. strict is 0 or 1, or the reward where no scorer says which, and NaN if it could not be
    scored; partial is in [0, 1] or NaN, and so is ta, the share of the prompt's exam questions answered yes;
    reasoning_correct is None where reasoning cannot be judged. png and chain (its number within the prompt) serve
    people only."""

    tag: str
    prompt: str
    reasoning: str
    strict: float
    partial: float
    reasoning_correct: bool | None
    png: bytes = b""
    chain: int = 0
    ta: float = math.nan

    @property
    def scored(self) -> bool:
        return not math.isnan(self.strict)

    @property
    def right(self) -> bool | None:
        """None where nobody says."""
        return self.strict == 1 if self.strict in (0, 1) else None


@dataclass(frozen=True)
class Unit:
    """How people are told a number: times so much, with so many digits."""

    factor: float
    digits: int
    suffix: str

    def value(self, value: float | None) -> str:
        """0.3125 -> 31.2 %, None -> a dash."""
        return "–" if value is None else f"{self.factor * value:.{self.digits}f}{self.suffix}"

    def change(self, value: float) -> str:
        """With its sign, in points."""
        return f"{self.factor * value:+.{self.digits}f}"

    def span(self, interval: Sequence[float] | None) -> str:
        """An interval, in brackets behind a number."""
        if interval is None:
            return ""
        low, high = (f"{self.factor * bound:.{self.digits}f}" for bound in interval)
        return f" ({low} to {high})"


PERCENT, PLAIN = Unit(100, 1, " %"), Unit(1, 3, "")


def unit(result: Result, key: str) -> Unit:
    """That of a headline, or of by_tag."""
    return PLAIN if _of_reward(result) and key in {*REWARDS, "by_tag"} else PERCENT


def headlines(result: Result) -> dict[str, str]:
    """Keys and names of its single numbers."""
    return HEADLINES | (REWARDS if _of_reward(result) else {})


def _of_reward(result: Result) -> bool:
    return result.get("judge") == "reward"


def summarise(
    rows: Sequence[Sample],
    *,
    version: int,
    step: int | None = None,
    judge: Literal["strict", "reward"] = "strict",
    seed: int = 0,
) -> Result:
    """The result of one evaluation, ready for JSON; judge: what strict is in the samples. ValueError if no image was
    scored.

    Unscored images are counted in `unscored` and left out of everything else, never counted as wrong. The interval
    is the 95 % percentile bootstrap over prompts (10,000 resamples). `prompts` keeps the counts by prompt that
    `compare` pairs, of a prompt without a scored image too.
    """
    rows = sorted(rows, key=lambda row: (row.tag, row.prompt))
    scored = [row for row in rows if row.scored]
    if not scored:
        raise ValueError(f"none of the {len(rows)} evaluated images was scored; see the reward actors' errors")
    prompts = [_counts(list(of_prompt)) for _, of_prompt in groupby(rows, key=lambda row: (row.tag, row.prompt))]
    by_tag = _by_tag(prompts)
    judged = [row for row in scored if row.reasoning_correct is not None]
    images = Counter((row.tag, row.prompt) for row in rows)
    return {
        "step": step,
        "version": version,
        "judge": judge,
        "n_prompts": len(prompts),
        "images_per_prompt": Counter(images.values()).most_common(1)[0][0],
        "n_images": len(scored),
        "unscored": len(rows) - len(scored),
        "strict": mean([row.strict for row in scored]),
        "strict_interval": _interval(_ratios(prompts, "strict", "images", seed)),
        "task_mean": _mean_of_tasks(by_tag),
        "task_mean_interval": _interval(_means_of_tasks(prompts, seed)),
        "ta": mean([row.ta for row in scored]),
        "ta_interval": _interval(_ratios(prompts, "ta", "ta_images", seed)),
        "partial": mean([row.partial for row in scored]),
        "reasoning_accuracy": mean([float(row.reasoning_correct is True) for row in judged]),
        "image_given_reasoning": mean([row.strict for row in judged if row.reasoning_correct]),
        "by_tag": by_tag,
        "prompts": prompts,
    }


def compare(before: Result, after: Result, seed: int = 0) -> Result:
    """Two results, on the prompts of which both have scored images. ValueError if they share none.

    Every headline gets {before, after, difference}; strict, ta and reasoning_accuracy also an `interval` of the
    difference, from a bootstrap over prompts in which both results see the same resample. by_tag holds the strict
    accuracies. A number that one side lacks is None, and so is its difference. partial and image_given_reasoning,
    which are not kept by prompt, are those of all prompts of each side.
    """
    keyed = [{(p["tag"], p["prompt"]): p for p in result["prompts"] if p["images"]} for result in (before, after)]
    common = [key for key in keyed[0] if key in keyed[1]]
    if not common:
        raise ValueError("the two evaluations have no prompt in common; compare runs of the same held-out file")
    first, last = ([of[key] for key in common] for of in keyed)
    result: Result = {"n_prompts": len(common)}
    for key in HEADLINES:
        result[key] = _difference(before[key], after[key])
    for key, hits, counts in (
        ("strict", "strict", "images"),
        ("ta", "ta", "ta_images"),
        ("reasoning_accuracy", "reasoning_correct", "judged"),
    ):
        result[key] = _difference(_ratio(first, hits, counts), _ratio(last, hits, counts))
        old, new = (_ratios(side, hits, counts, seed) for side in (first, last))
        result[key]["interval"] = None if old is None or new is None else _interval(new - old)
    old_tags, new_tags = _by_tag(first), _by_tag(last)
    result["task_mean"] = _difference(_mean_of_tasks(old_tags), _mean_of_tasks(new_tags))
    tags = {**before["by_tag"], **after["by_tag"]}
    result["by_tag"] = {
        tag: _difference(*(side.get(tag, {}).get("strict") for side in (old_tags, new_tags))) for tag in tags
    }
    return result


def table(before: Result, after: Result | None = None) -> list[tuple[str, str, str, str]]:
    """Name, before, after and difference in points, as text: the headlines that were measured, then the tags.
    Without `after` the last two are empty."""
    versus = compare(before, after) if after else None

    def line(key: str, name: str, *path: str) -> tuple[str, str, str, str]:
        told = unit(before, path[0])
        cell = told.value(_at(before, *path)) + told.span(before.get(f"{key}_interval"))
        if after is None or versus is None:
            return name, cell, "", ""
        new = told.value(_at(after, *path)) + told.span(after.get(f"{key}_interval"))
        change = versus["by_tag"][key] if path[0] == "by_tag" else versus[key]
        difference = "–" if change["difference"] is None else told.change(change["difference"])
        return name, cell, new, difference + told.span(change.get("interval"))

    tags, names = {**before["by_tag"], **(after["by_tag"] if after else {})}, headlines(before)
    measured = [key for key in names if before[key] is not None or (after and after[key] is not None)]
    return [line(key, names[key], key) for key in measured] + [line(tag, tag, "by_tag", tag, "strict") for tag in tags]


def to_markdown(result: Result, before: Result | None = None) -> str:
    """A Markdown table of one result, or of a result against the one before it."""
    rows = table(before, result) if before else [row[:2] for row in table(result)]
    header = ("", "before", "after", "difference") if before else ("", "result")
    lines = [f"{result['n_prompts']} prompts x {result['images_per_prompt']} images", ""]
    if made := result.get("protocol"):
        lines[:0] = ["; ".join(f"{name} {value}" for name, value in made.items()), ""]
    lines += _markdown(header, rows)
    exams = {tag: of_tag["ta"] for tag, of_tag in result["by_tag"].items() if of_tag["ta"] is not None}
    if exams and not before:
        lines += ["", *_markdown(("", "TA-like score"), [(tag, PERCENT.value(ta)) for tag, ta in exams.items()])]
    return "\n".join(lines) + "\n"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *escaped)]


def _counts(of_prompt: list[Sample]) -> dict[str, Any]:
    rows = [row for row in of_prompt if row.scored]
    return {
        "tag": of_prompt[0].tag,
        "prompt": of_prompt[0].prompt,
        "images": len(rows),
        "strict": sum(row.strict for row in rows),
        "ta": sum(row.ta for row in rows if not np.isnan(row.ta)),
        "ta_images": sum(not np.isnan(row.ta) for row in rows),
        "judged": sum(row.reasoning_correct is not None for row in rows),
        "reasoning_correct": sum(row.reasoning_correct is True for row in rows),
    }


def _by_tag(prompts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Prompts in order of tags."""
    return {tag: _tag_result(list(of_tag)) for tag, of_tag in groupby(prompts, key=lambda prompt: prompt["tag"])}


def _mean_of_tasks(by_tag: Mapping[str, Any]) -> float | None:
    return mean([tag["strict"] for tag in by_tag.values() if tag["strict"] is not None])


def _means_of_tasks(prompts: Sequence[dict[str, Any]], seed: int) -> NDArray[np.float64] | None:
    """`_mean_of_tasks` in every resample of the prompts of each task, [10,000]."""
    of_tags = [list(of_tag) for _, of_tag in groupby(prompts, key=lambda prompt: prompt["tag"])]
    tasks = [_ratios(of_tag, "strict", "images", seed + place) for place, of_tag in enumerate(of_tags)]
    known = [task for task in tasks if task is not None]
    return np.nanmean(known, 0) if known else None


def _tag_result(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "strict": _ratio(prompts, "strict", "images"),
        "ta": _ratio(prompts, "ta", "ta_images"),
        "n_prompts": len(prompts),
        "n_images": sum(prompt["images"] for prompt in prompts),
    }


def mean(values: Sequence[float]) -> float | None:
    """Of those that are numbers; None if none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _ratio(prompts: Sequence[Mapping[str, Any]], hits: str, counts: str) -> float | None:
    total = sum(prompt[counts] for prompt in prompts)
    return sum(prompt[hits] for prompt in prompts) / total if total else None


def _ratios(prompts: Sequence[Mapping[str, Any]], hits: str, counts: str, seed: int) -> NDArray[np.float64] | None:
    """The ratio in every resample of the prompts, [10,000]; NaN where a resample has none to count. Equal seeds and
    numbers of prompts give equal resamples, which is what pairs two evaluations."""
    hit, count = (np.array([prompt[key] for prompt in prompts], np.float64) for key in (hits, counts))
    if not count.any():
        return None
    rng = np.random.default_rng(seed)
    # In blocks: 10,000 resamples of 10,000 prompts at once would take 800 MB.
    blocks = (rng.integers(len(prompts), size=(_RESAMPLES // 20, len(prompts))) for _ in range(20))
    with np.errstate(invalid="ignore"):
        return np.concatenate([hit[block].sum(1) / count[block].sum(1) for block in blocks])


def _interval(resampled: NDArray[np.float64] | None) -> list[float] | None:
    return None if resampled is None else np.nanpercentile(resampled, [2.5, 97.5]).tolist()


def _difference(before: float | None, after: float | None) -> dict[str, Any]:
    difference = None if before is None or after is None else after - before
    return {"before": before, "after": after, "difference": difference}


def _at(result: Mapping[str, Any], *path: str) -> float | None:
    value: Any = result
    for key in path:
        value = (value or {}).get(key)
    return value
