"""The page of `unigrpo reproduce`: tables and figures from the stored cells, whichever there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.rundir import replacing
from deploy.reproduction.cells import CURVES, Cell, Stored, missing
from deploy.reproduction.rows import ROWS, TASKS, Plan, settings

RESAMPLES = 4000
REWARD, STRICT, TA = CURVES
LEARNED = ("learned-none", "learned-latent-kl", "learned-velocity-mse")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Score:
    """A row's numbers: overall (mean of task accuracies), ta, strict and ta by task; cells behind them."""

    overall: Estimate
    ta: Estimate
    tasks: Mapping[str, Estimate]
    ta_tasks: Mapping[str, Estimate]
    cells: Sequence[Cell]


def score(cells: Sequence[Cell], seed: int = 0) -> Score:
    """Numbers of one row. Resamples draw seeds and, within each task, prompts (the same for all seeds).

    ValueError if the cells were evaluated on different prompts.
    """
    results = [cell["result"] for cell in cells]
    tags = np.array(results[0]["tags"])
    if any(result["tags"] != results[0]["tags"] for result in results):
        raise ValueError(f"the cells of row {cells[0]['row']} were evaluated on different prompts; remove the odd one")
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.multinomial(len(cells), [1 / len(cells)] * len(cells), RESAMPLES)
    by_task: dict[str, NDArray[np.float64]] = {}
    ta_by_task: dict[str, NDArray[np.float64]] = {}
    totals = np.zeros((2, RESAMPLES + 1))
    for task in dict.fromkeys(tags.tolist()):
        columns = {
            name: np.array([result[name] for result in results], np.float64)[:, tags == task]
            for name in ("images", "strict", "ta", "ta_images")
        }
        prompts = columns["images"].shape[1]
        drawn = rng.multinomial(prompts, [1 / prompts] * prompts, RESAMPLES)
        # First the sample itself, then the resamples.
        seeds, weights = np.vstack([np.ones(len(cells)), drawn_seeds]), np.vstack([np.ones(prompts), drawn])
        sums = {name: np.einsum("rs,sp,rp->r", seeds, column, weights) for name, column in columns.items()}
        # A prompt whose images all went unscored has none to count, and a resample of such prompts has no accuracy.
        with np.errstate(invalid="ignore"):
            by_task[task], ta_by_task[task] = sums["strict"] / sums["images"], sums["ta"] / sums["ta_images"]
        totals += sums["ta"], sums["ta_images"]
    tasks, ta_tasks = ({task: _estimate(values) for task, values in of.items()} for of in (by_task, ta_by_task))
    return Score(
        _estimate(np.nanmean(list(by_task.values()), 0)), _estimate(totals[0] / totals[1]), tasks, ta_tasks, cells
    )


def _estimate(values: NDArray[np.float64]) -> Estimate:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))


@dataclass(frozen=True)
class FigureOf:
    """Curves of some rows, one panel per metric."""

    title: str
    text: str
    rows: tuple[str, ...]
    panels: Mapping[str, str]


FIGURES = {
    "curves": FigureOf(
        "Training curves",
        "Mean over seeds, smoothed over 10 steps; the band is the range over seeds.",
        ("refl-think", "flowgrpo-think", "textgrpo", "unigrpo"),
        {"Training images, strict": STRICT, "TA-like": TA},
    ),
    "ablations": FigureOf(
        "Guidance in training, and the image gradient into the reasoning expert",
        "As above. With guidance the training images are guided, too.",
        ("unigrpo", "cfg", "no-image-gradient"),
        {"Training images, strict": STRICT, "TA-like": TA},
    ),
    "regulariser": FigureOf(
        "Regularisers under a reward that can be hacked",
        "The reward is the learned scorer; the strict detector is not trained on.",
        LEARNED,
        {"Learned reward": REWARD, "Truth, strict": STRICT},
    ),
}


def write_page(plan: Plan, stored: Stored) -> Path:
    """Writes OUT.md beside the plan's directory, and the figures into it."""
    drawn = {
        name: draw(
            plan.out / f"{name}.png", {row: stored.cells[row] for row in of.rows if row in stored.cells}, of.panels
        )
        for name, of in FIGURES.items()
    }
    page = plan.out.with_name(f"{plan.out.name}.md")
    with replacing(page) as aside:
        aside.write_text(to_markdown(plan, stored, [name for name, path in drawn.items() if path]), encoding="utf-8")
    return page


def to_markdown(plan: Plan, stored: Stored, figures: Sequence[str]) -> str:
    """The page. Numbers of this project in percent with intervals, the paper's beside them."""
    scores = {row: score(cells) for row, cells in stored.cells.items()}
    parts = [
        "# The paper's rows and ablations, in small",
        "",
        f"    {plan.command}        # continues from the cells in {plan.out.name}/cells",
        "",
        "Shapes instead of GenEval and TA's prompts, a 2.3 M policy instead of BAGEL: only the order of rows can be "
        "compared. Intervals: 95 % bootstrap over seeds and, within each task, prompts. Overall is the mean of the "
        "task accuracies.",
        "",
        *_overall(scores),
        "",
        *_budgets(plan, stored),
        *_gaps(plan, stored),
        "",
        *_findings(scores),
        "## Strict accuracy by task",
        "",
        "In round brackets: the paper's.",
        "",
        *_tasks({row: found.tasks for row, found in scores.items()}, {row: ROWS[row].tasks or () for row in scores}),
        "",
        "## TA-like score by task",
        "",
        "The mean over images of the part of a prompt's questions (each object, number, color, relation) answered yes.",
        "",
        *_tasks({row: found.ta_tasks for row, found in scores.items()}, {}),
    ]
    for name in figures:
        of = FIGURES[name]
        parts += ["", f"## {of.title}", "", of.text, "", f"![{of.title}]({plan.out.name}/{name}.png)"]
        if name == "regulariser":
            parts += ["", *_hacked(stored)]
    return "\n".join([*parts, "", "## Machines", "", *_machines(scores)]) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]


def _overall(scores: Mapping[str, Score]) -> list[str]:
    lines = []
    for row, about in ROWS.items():
        theirs = [f"{100 * about.paper[0]:.1f}", f"{100 * about.paper[1]:.0f}"] if about.paper else ["–", "–"]
        if row not in scores:
            lines.append([about.title, "missing", theirs[0], "missing", theirs[1], "0", "–"])
            continue
        found = scores[row]
        steps = " + ".join(str(steps) for steps in found.cells[0]["origin"]["steps"] if steps)
        minutes = np.mean([cell["minutes"] for cell in found.cells])
        lines.append(
            [
                about.title,
                str(found.ta),
                theirs[0],
                str(found.overall),
                theirs[1],
                str(len(found.cells)),
                f"{steps} in {minutes:.0f} min" if minutes else "evaluated only",
            ]
        )
    header = ["", "TA-like, %", "paper: TA", "strict, overall, %", "paper: GenEval", "seeds", "steps of a seed"]
    return _table(header, lines)


def _shown(plan: Plan, stored: Stored) -> tuple[str, ...]:
    """Rows that were asked for or have cells; overrides may contradict the recipes of others."""
    return tuple(row for row in ROWS if row in plan.rows or row in stored.cells)


def _budgets(plan: Plan, stored: Stored) -> list[str]:
    """What is not alike in the rows beside what their names say: more than one stage, and guidance of evaluation."""
    lines: list[str] = []
    guided: list[str] = []
    unguided = False
    for row in _shown(plan, stored):
        about, configs = ROWS[row], settings(plan, row)
        trained = [config.steps for config in configs if config.steps]
        if len(trained) > 1:
            lines.append(f"- {about.title}: {' + '.join(map(str, trained))} = {sum(trained)} steps in all.")
        if not configs[-1].evaluation.cfg.enabled:
            unguided = True
            continue
        how = "trained and evaluated" if configs[-1].sampling.cfg.enabled else "evaluated"
        guided.append(f"- {about.title}: {how} with text scale {configs[-1].evaluation.cfg.text_scale:g}.")
    return [*lines, *guided, *(["- The other rows: without guidance."] if guided and unguided else [])]


def _gaps(plan: Plan, stored: Stored) -> list[str]:
    """Cells that are missing or stale, of every row and seed that was asked for or is there."""
    whole = replace(plan, rows=_shown(plan, stored), seeds=tuple(sorted({*plan.seeds, *stored.seeds})))
    absent: dict[str, list[str]] = {row: [] for row in ROWS}
    for row, seed in missing(whole, stored):
        absent[row].append(str(seed))
    lines = []
    if any(absent.values()):
        named = "; ".join(f"{ROWS[row].title} (seeds {', '.join(seeds)})" for row, seeds in absent.items() if seeds)
        lines.append(f"- Missing: {named}.")
    alone = [
        ROWS[row].title for row, cells in stored.cells.items() if len(cells) == 1 and sum(cells[0]["origin"]["steps"])
    ]
    if alone:
        lines.append(f"- Of one seed only, so that the interval is one over prompts: {'; '.join(alone)}.")
    lines += _types(stored)
    if stored.stale:
        named = "; ".join(f"{row} seed {seed} (another {differs})" for (row, seed), differs in stored.stale.items())
        lines.append(f"- Stale, made of something else than the other cells and not counted: {named}.")
    return lines


def _types(stored: Stored) -> list[str]:
    """Cells of another compute type than most: a CPU without bf16 products takes float32."""
    by_type: dict[str, dict[str, list[str]]] = {}
    for row, cells in stored.cells.items():
        for cell in cells:
            by_type.setdefault(_computed_in(cell), {}).setdefault(row, []).append(str(cell["seed"]))
    names = sorted(by_type, key=lambda name: -sum(map(len, by_type[name].values())))
    return [
        f"- Computed in {name} instead of {names[0]}, as the machine does: "
        + "; ".join(f"{ROWS[row].title} (seeds {', '.join(seeds)})" for row, seeds in by_type[name].items())
        + "."
        for name in names[1:]
    ]


def _hacked(stored: Stored) -> list[str]:
    """How far reward and truth went, from the first ten steps to the last ten, and which way."""
    lines, ways = [], []
    for row in LEARNED:
        if row not in stored.cells:
            continue
        curves = [_curves(stored.cells[row], key) for key in (REWARD, STRICT)]
        first = min(9, curves[0].shape[1] - 1)
        for number, cell in enumerate(stored.cells[row]):
            ends = [f"{100 * curve[number, first]:.1f} → {100 * curve[number, -1]:.1f}" for curve in curves]
            lines.append([f"{ROWS[row].title}, seed {cell['seed']}", *ends])
        gained = [curve[:, -1] > curve[:, first] for curve in curves]
        both, neither, hacked = (
            int(chosen.sum()) for chosen in (gained[0] & gained[1], ~gained[0] & ~gained[1], gained[0] & ~gained[1])
        )
        ways.append(
            f"- {ROWS[row].title}: of {len(gained[0])} seeds, reward and truth rose in {both}, the reward rose while "
            f"the truth fell (the scorer was fooled) in {hacked}, and both fell (the policy broke down) in {neither}."
        )
    table = _table(["mean of ten steps, first → last", "learned reward, %", "truth, strict, %"], lines)
    return [*table, "", *ways]


def _findings(scores: Mapping[str, Score]) -> list[str]:
    """What the issue asks of the numbers, computed from them."""
    if not {"sft-think", "unigrpo"} <= scores.keys():
        return []
    start, ours = scores["sft-think"].overall, scores["unigrpo"].overall
    removed = (ours.mean - start.mean) / (1 - start.mean)
    lines = [f"- UniGRPO removes {100 * removed:.0f} % of the strict error of SFT with thinking (the paper: 44 %)."]
    single = [row for row in ("refl", "refl-think", "flowgrpo", "flowgrpo-think", "textgrpo") if row in scores]
    if single:
        best = max(single, key=lambda row: scores[row].overall.mean)
        above = ours.low > scores[best].overall.high
        lines.append(
            f"- The best row that trains one modality is {ROWS[best].title}, {scores[best].overall}; UniGRPO's "
            f"interval {'lies above' if above else 'does not lie above'} it."
        )
    if {"sft", "flowgrpo", "flowgrpo-think"} <= scores.keys():
        gains = [
            f"{100 * (scores[after].overall.mean - scores[before].overall.mean):.1f}"
            for before, after in (("sft", "flowgrpo"), ("sft-think", "flowgrpo-think"))
        ]
        lines.append(
            f"- FlowGRPO adds {gains[0]} points without thinking and {gains[1]} with it. The start draws from its own "
            f"plan: without one it scores {100 * scores['sft'].overall.mean:.1f} instead of {100 * start.mean:.1f}, so "
            "rows without thinking begin, and may end, below SFT with thinking."
        )
    lines += [
        f"- {ROWS[row].title}: {scores[row].overall} instead of {ours}."
        for row in ("cfg", "cfg-evaluation", "no-image-gradient")
        if row in scores
    ]
    if set(LEARNED) <= scores.keys():
        none, kl, mse = (scores[row].overall for row in LEARNED)
        apart = kl.high < mse.low or mse.high < kl.low
        lines.append(
            f"- Under the learned reward: {none} without a regulariser, {kl} with the latent KL and {mse} with the "
            f"velocity MSE; the last two intervals {'lie apart' if apart else 'overlap'}."
        )
    order = sorted(scores, key=lambda row: -scores[row].overall.mean)
    lines.append(f"- Order by strict accuracy: {' > '.join(ROWS[row].title for row in order)}.")
    return [*lines, ""]


def _tasks(scores: Mapping[str, Mapping[str, Estimate]], papers: Mapping[str, Sequence[float]]) -> list[str]:
    found = {task for of_row in scores.values() for task in of_row}
    tasks = [*(task for task in TASKS if task in found), *sorted(found - set(TASKS))]
    lines = []
    for row, of_row in scores.items():
        paper = dict(zip(TASKS, papers.get(row, ()), strict=False))
        lines.append([ROWS[row].title, *(_task(of_row.get(task), paper.get(task)) for task in tasks)])
    return _table(["", *tasks], lines)


def _task(measured: Estimate | None, paper: float | None) -> str:
    ours = "–" if measured is None else str(measured)
    return ours if paper is None else f"{ours} ({100 * paper:.0f})"


def _machines(scores: Mapping[str, Score]) -> list[str]:
    cells = [cell for found in scores.values() for cell in found.cells]
    lines = []
    for name in dict.fromkeys(map(_machine, cells)):
        own = [cell for cell in cells if _machine(cell) == name]
        dates, minutes = sorted(cell["finished"] for cell in own), sum(cell["minutes"] for cell in own)
        lines.append(f"- {name}: {len(own)} cells, {minutes:.0f} minutes of training steps, {dates[0]} to {dates[-1]}")
    if lines:
        lines.append(f"- A stage that rows share counts in each of them. {_anew(scores)}")
    return lines


def _anew(scores: Mapping[str, Score]) -> str:
    """Which cells had a stage that they share with another row's trained for themselves: their curves tell."""
    curves = {
        (ROWS[row].recipes, cell["seed"]): cell["curves"][REWARD]
        for row, found in scores.items()
        for cell in found.cells
    }
    apart = [
        f"{ROWS[row].title} (seed {cell['seed']})"
        for row, found in scores.items()
        for cell in found.cells
        if len(ROWS[row].recipes) > 1
        and (shared := curves.get((ROWS[row].recipes[:1], cell["seed"])))
        and cell["curves"][REWARD][: len(shared)] != shared
    ]
    return f"It was trained once{', but anew for ' + '; '.join(apart) if apart else ''}."


def _machine(cell: Cell) -> str:
    return f"{cell['machine']}, {_computed_in(cell)}"


def _computed_in(cell: Cell) -> str:
    return " and ".join(dict.fromkeys(cell["dtypes"]))


def draw(path: Path, rows: Mapping[str, Sequence[Cell]], panels: Mapping[str, str]) -> Path | None:
    """One panel per metric, one line per row, over training steps. None without a row that has curves."""
    trained = {row: cells for row, cells in rows.items() if any(len(cell["curves"][REWARD]) > 1 for cell in cells)}
    if not trained:
        return None
    figure = Figure(figsize=(5 * len(panels), 3.4), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for row, cells in trained.items():
            curves = _curves(cells, key)
            steps = np.arange(1, curves.shape[1] + 1)
            axes.plot(steps, curves.mean(0), label=ROWS[row].title)
            axes.fill_between(steps, curves.min(0), curves.max(0), alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    return path


def _curves(cells: Sequence[Cell], key: str, window: int = 10) -> NDArray[np.float64]:
    """Running means [seeds, steps] as far as every seed goes; nothing is averaged across its missing values."""
    columns: list[Any] = [cell["curves"][key] for cell in cells]
    length = min(map(len, columns))
    values = np.array([[np.nan if v is None else v for v in column[:length]] for column in columns], np.float64)
    return np.stack([np.nanmean(values[:, max(0, s - window + 1) : s + 1], 1) for s in range(length)], 1)
