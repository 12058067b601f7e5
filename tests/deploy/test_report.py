"""The report stands alone, survives hostile text and unfinished runs, and shows the numbers of the run."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.config import ConfigError, TrainConfig
from common.recipe import to_yaml
from common.records import decode_png, encode_png
from common.rundir import RunDirectory
from deploy.evaluation import Sample, summarise
from deploy.progress import Progress
from deploy.report import read_samples, write_report, write_samples

HOSTILE = "draw <script>alert(1)</script> & \"quotes\" {{ 7 * 7 }} <img src=x onerror='x'>"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "demo").create(to_yaml(TrainConfig(steps=4)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Four steps and three evaluations, with its report."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "demo").create(to_yaml(TrainConfig(steps=4)))
    for step, rate in ((0, 0.3), (2, 0.5), (4, 0.8)):
        _evaluate(run, step, rate)
    _train(run, 4)
    assert write_report(run) == run.report
    return run


def _samples(rate: float, size: int = 32) -> list[Sample]:
    rng = np.random.default_rng(int(100 * rate))
    return [
        Sample(
            tag=("color", "count")[p % 2],
            prompt=HOSTILE if p == 0 else f"prompt {p}",
            reasoning="<think> plan: <b>red</b> circle. </think>",
            strict=float(rng.random() < rate) if p < 5 else float("nan"),
            partial=0.5,
            reasoning_correct=(True, False, None)[p % 3],
            png=encode_png(rng.integers(0, 256, (size, size, 3), np.uint8)),
            chain=c,
        )
        for p in range(6)
        for c in range(2)
    ]


def _evaluate(run: RunDirectory, step: int, rate: float) -> None:
    rows = _samples(rate)
    run.write_json(run.evaluation_file(step), summarise(rows, version=step, step=step))
    write_samples(run.samples_file(step), rows)


def _train(run: RunDirectory, steps: int) -> None:
    for step in range(steps):
        run.append_metrics(
            {
                "step": step,
                "reward/mean": 0.1 * step,
                "reward/std": 0.2,
                "reward/shapes": 0.1 * step,
                "reward/actors": 2.0,
                "reward/queued_groups": 0.0,
                "reward/$c<l&ip$": 0.3,
                "grad_norm/reasoning": 1.0 + step,
                "grad_norm/denoising": float("nan"),
                "text/entropy": 0.5,
                "text/clip_fraction": 0.0,
                "image/velocity_mse": 1e-3,
                "time/rollout_s": 3.0,
                "time/update_s": 2.0,
                "time/step_s": 6.0,
            }
        )


def _html(run: RunDirectory) -> str:
    path = write_report(run)
    assert path == run.report
    return path.read_text()


class _Page(HTMLParser):
    """Checks that tags nest, and keeps images, tags and text."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run(finished: RunDirectory) -> None:
    html = finished.report.read_text()
    page = _Page(html)
    before, after = (finished.read_evaluations()[step] for step in (0, 4))
    assert "4 of 4 training steps are done, each on 8 prompts with 16 chains" in page.text
    assert "They took 0.4 minutes" in page.text
    assert f"held-out prompts was {100 * before['strict']:.1f} % before training" in page.text
    assert f"and {100 * after['strict']:.1f} % after it" in page.text
    cells = re.findall(r"<th>(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", html)
    assert [cell[0] for cell in cells] == [
        "Strict accuracy",
        "Mean of task accuracies",
        "Partial score",
        "Reasoning accuracy",
        "Image accuracy given right reasoning",
        "color",
        "count",
    ]
    for tag, old, new, _ in cells[-2:]:
        assert old == f"{100 * before['by_tag'][tag]['strict']:.1f} %"
        assert new == f"{100 * after['by_tag'][tag]['strict']:.1f} %"
    assert re.search(r'class="first-tag"><th>color</th>', html)
    assert "2 images could not be scored" in page.text
    titles = re.findall(r"<section><h3>(.*?)</h3><svg", html)
    assert titles == [
        "Held-out: strict accuracy",
        "Training reward (mean and standard deviation)",
        "Gradient norms",
        "Clip fractions",
        "Reasoning entropy (nats)",
        "Velocity error against the reference",
        "Time of a step (s)",
    ]
    assert "window_range:" in page.text
    # A curve per scorer, and none of what else is counted about rewards.
    assert ">shapes</text>" in html and ">queued_groups</text>" not in html


def test_samples_show_before_and_after_beside_their_reasoning(finished: RunDirectory) -> None:
    html = finished.report.read_text()
    images = [decode_png(b64decode(src.removeprefix("data:image/png;base64,"))) for src in _Page(html).images]
    old, new = ([decode_png(s.png) for s in _samples(rate)] for rate in (0.3, 0.8))
    expected = [image for pair in zip(old, new, strict=True) for image in pair]
    assert len(images) == 24
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    first = html[html.index("<section class") :]
    first = first[: first.index("</section>")]
    marks = [(s.reasoning_correct, s.strict) for pair in zip(*map(_samples, (0.3, 0.8)), strict=True) for s in pair][:4]
    found = re.findall(r"(?:✓|✗) (reasoning|image) (right|wrong)", first)
    assert found == [
        mark
        for reasoning, strict in marks
        for mark in (("reasoning", "right" if reasoning else "wrong"), ("image", "right" if strict else "wrong"))
    ]
    assert html.count("– image not judged") == 4
    assert html.count("– reasoning not judged") == 8


def test_untrusted_text_is_escaped_and_nothing_is_loaded(finished: RunDirectory) -> None:
    html = finished.report.read_text()
    page = _Page(html)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert HOSTILE in page.text
    assert "<think> plan: <b>red</b> circle. </think>" in page.text
    assert "$c<l&ip$" in page.text
    assert all(src.startswith("data:image/png;base64,") for src in page.images)
    loaded = re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!#)[^)]*\)|@import', html)
    assert loaded == []


def test_figures_are_well_formed_and_share_no_ids(finished: RunDirectory) -> None:
    html = finished.report.read_text()
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 7
    ids = [set(re.findall(r'\bid="([^"]+)"', figure)) for figure in figures]
    assert sum(map(len, ids)) == len(set.union(*ids))
    for figure, own in zip(figures, ids, strict=True):
        ET.fromstring(figure)
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', figure)) <= own
        assert "currentColor" in figure
        assert "#7f7f80" not in figure


def test_an_unfinished_run(run: RunDirectory) -> None:
    page = _Page(_html(run))
    assert "0 of 4 training steps are done" in page.text
    assert "There is no evaluation yet." in page.text
    assert "svg" not in page.tags
    _evaluate(run, 0, 0.3)
    _train(run, 1)
    page = _Page(_html(run))
    assert "1 of 4 training steps are done" in page.text
    assert "there is no evaluation after training yet" in page.text
    assert len(page.images) == 12
    assert "difference" not in page.text
    run.samples_file(0).unlink()
    assert "No samples yet." in _html(run)


def test_a_missing_run_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        write_report(RunDirectory(tmp_path / "nowhere"))


def test_only_small_images_are_pixelated(run: RunDirectory) -> None:
    write_samples(run.samples_file(0), [_samples(0.3, size)[chain] for chain, size in enumerate((128, 129))])
    run.write_json(run.evaluation_file(0), summarise(_samples(0.3), version=0, step=0))
    html = _html(run)
    assert html.count('class="small"') == 1


def test_samples_round_trip(tmp_path: Path) -> None:
    rows = _samples(0.3)
    write_samples(tmp_path / "x.parquet", rows)
    assert repr(read_samples(tmp_path / "x.parquet")) == repr(rows)


def test_plain_progress_prints_one_line_per_step() -> None:
    out = io.StringIO()
    with Progress(3, done=1, console=Console(file=out, width=40)) as progress:
        progress.phase("starting 2 rollout replicas [cpu] ...")
        progress.update(1, {"reward/mean": 0.25, "rollout/images_per_s": 12.34})
        progress.update(2, {"reward/mean": float("nan")})
    assert out.getvalue().splitlines() == [
        "starting 2 rollout replicas [cpu] ...",
        "step 2/3  reward 0.250  12.3 images/s  ? left",
        "step 3/3  reward ?  ? images/s  0:00:00 left",
    ]


def test_terminal_progress_redraws_and_the_summary_stays() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    results = [summarise([replace(s, tag="[/b]olor") for s in _samples(rate)], version=0) for rate in (0.3, 0.8)]
    with Progress(3, console=console) as progress:
        progress.phase("evaluating")
        progress.update(0, {"reward/mean": 0.25})
        progress.summary(results[0], results[1], Path("/runs/" + "x" * 120 + "/report.html"))
    text = out.getvalue()
    assert "step 1/3  reward 0.250" in text
    assert re.search(rf"Strict accuracy +│ {100 * results[0]['strict']:.1f} %", text)
    assert "[/b]olor" in text  # not markup
    assert f"report: /runs/{'x' * 120}/report.html" in text
