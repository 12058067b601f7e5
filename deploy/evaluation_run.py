"""Runs an evaluation on the actors: held-out prompts through the same replicas and scorers as training."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError

from common.config import TrainConfig
from common.events import event
from common.prompts import evenly
from common.rundir import replacing
from deploy.evaluation import Sample, summarise, to_markdown
from deploy.grid import sample_grid
from deploy.recovery import redoing_lost
from deploy.report import read_samples, write_samples
from deploy.requests import evaluation_requests
from deploy.scoring import tickets
from deploy.session import EvaluationSession
from deploy.shown import describe
from rewards.pool import Scored
from rollout.batch import RolloutError

log = logging.getLogger(__name__)


def evaluate(session: EvaluationSession, step: int, required: bool = True) -> dict[str, Any]:
    """Evaluates the weights that the replicas hold; writes eval/step-*.json and the samples of the report. required:
    OSError if they cannot be written; else that is a warning."""
    config, run = session.config, session.run
    session.progress.phase(f"evaluating {len(session.heldout)} held-out prompts at step {step}")
    shown = {prompt.id for prompt in evenly(session.heldout, config.evaluation.samples)}
    batch = session.rollout.submit(evaluation_requests(config, session.heldout), first=True)

    def read() -> tuple[Scored, list[list[dict[str, Any]]]]:
        scored = session.rewards.finish(tickets(session, batch))
        details = describe.remote(batch.refs, [prompt.id in shown for prompt in session.heldout])
        try:
            return scored, ray.get(details, timeout=config.rollout.deadline_s)
        except GetTimeoutError as error:
            raise RolloutError(
                f"the {len(batch.groups)} evaluated groups were not described within {config.rollout.deadline_s:.0f} s "
                "(rollout.deadline_s); does the cluster still have a node for tasks?"
            ) from error

    scored, details = redoing_lost(session, batch, read)
    strict, partial, ta = (_component(scored, name) for name in ("strict", "partial", "ta"))
    judge: Literal["strict", "reward"] = "reward" if strict is None else "strict"
    nothing = np.full(scored.total.shape, np.nan)
    strict = scored.total if strict is None else strict
    partial, ta = (nothing if column is None else column for column in (partial, ta))
    rows: list[Sample] = []
    images: Counter[tuple[str, str]] = Counter()
    for place, prompt in enumerate(session.heldout):
        tag = str(prompt.metadata.get("tag") or "untagged")
        for chain, about in enumerate(details[place]):
            rows.append(
                Sample(
                    tag=tag,
                    prompt=prompt.text,
                    strict=float(strict[place, chain]),
                    partial=float(partial[place, chain]),
                    ta=float(ta[place, chain]),
                    # A file may ask for the same twice: to people these are more images of one prompt.
                    chain=images[tag, prompt.text] + chain,
                    **about,
                )
            )
        images[tag, prompt.text] += len(details[place])
    result = summarise(rows, version=session.version, step=step, judge=judge) | {"protocol": protocol(config)}
    samples = [row for row in rows if row.png]
    try:
        write_samples(run.samples_file(step), samples)
        run.write_json(run.evaluation_file(step), result)  # last: an evaluation that has it is whole
    except OSError as error:
        if required:
            raise
        log.warning("the evaluation at step %d could not be written: %s", step, error)
    session.show(step, samples)
    event("evaluation", step=step, version=session.version, strict=result["strict"])
    session.progress.phase(
        f"step {step}: {judge} {result['strict']:.3f}, reasoning {result['reasoning_accuracy'] or 0:.3f}, "
        f"image given right reasoning {result['image_given_reasoning'] or 0:.3f}"
    )
    return result


def protocol(config: TrainConfig) -> dict[str, Any]:
    """How an evaluation was made, in the recipe's words; model: where it was not amid a training."""
    made, cfg = config.evaluation, config.evaluation.cfg
    guidance = {f"cfg.{name}": value for name, value in cfg.model_dump(mode="json").items()} if cfg.enabled else {}
    return {
        **({} if config.steps else {"model": config.model.path}),
        "heldout": config.data.heldout,
        "points": made.points,
        "shift": config.sampling.shift,
        "think": config.sampling.think,
        "seed": made.seed,
        "cfg.text_scale": cfg.text_scale,
        **guidance,
    }


def _component(scored: Scored, name: str) -> NDArray[np.floating] | None:
    """The column [B, G] that a scorer calls by this name, whatever the scorer's weight: a run on another reward is
    judged by the detector too if the recipe lists it with weight 0."""
    return next((values for key, values in scored.components.items() if key.endswith(f"/{name}")), None)


def write_outcome(session: EvaluationSession, step: int, result: dict[str, Any]) -> tuple[Path, Path]:
    """The evaluation for people, beside its JSON: a Markdown table, and the sample images as a grid."""
    table, grid = (session.run.evaluation_file(step).with_suffix(suffix) for suffix in (".md", ".png"))
    with replacing(table) as aside:
        aside.write_text(to_markdown(result), encoding="utf-8")
    picture = sample_grid(read_samples(session.run.samples_file(step)))
    with replacing(grid) as aside:
        picture.save(aside, "PNG")
    return table, grid
