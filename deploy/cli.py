"""The command line: unigrpo train, plan, submit, sft, eval, generate, answer, export, report, scale, reproduce, chaos,
timeline, schema."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from common.config import ConfigError, TrainConfig, run_path
from common.recipe import apply_overrides, load_config, read_recipe, to_yaml, validate
from common.types import NonFiniteError, SelfTestError
from deploy.reproduction.rows import STEPS

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Overrides = Annotated[list[str] | None, typer.Argument(help="Fields to override, e.g. steps=2 run_name=try.")]


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="Recipe file, or a name in deploy/recipes.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print config, batch, actors, parameters and memory; start nothing.")
    ] = False,
    gpus: Annotated[str | None, typer.Option(help="With --dry-run: GPUs to fit in, e.g. 8xH100-80GB.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory.")] = None,
) -> None:
    """Train with UniGRPO."""
    config = _resumed(resume, recipe, overrides) if resume else load_config(recipe or "shapes", overrides)
    if dry_run:
        from deploy.preflight import check_inputs, describe

        inputs = check_inputs(config, weights=False)
        typer.echo(to_yaml(config))
        typer.echo(describe(config))
        typer.echo(inputs.parameters)
        _show_plan(config, gpus)
        return
    from deploy.loop import train as run_training
    from deploy.report import write_report
    from deploy.session import open_session

    with open_session(config, resume is not None) as session:
        run = run_training(session)
    results = list(run.read_evaluations().values())
    session.progress.summary(results[0], results[-1] if len(results) > 1 else None, write_report(run))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or a name in deploy/recipes.")],
    overrides: Overrides = None,
    gpus: Annotated[str | None, typer.Option(help="GPUs to plan for, e.g. 8xH100-80GB.")] = None,
) -> None:
    """Predict memory and step time from shapes and stated rates, without weights; exits with 1 if it does not fit."""
    _show_plan(load_config(recipe, overrides), gpus)


def _show_plan(config: TrainConfig, gpus: str | None) -> None:
    from deploy.devices import parse_gpus
    from deploy.plan import make_plan

    made = make_plan(config, parse_gpus(gpus) if gpus else None)
    typer.echo(str(made))
    if made.faults:
        raise typer.Exit(1)


def _resumed(directory: Path, recipe: str | None, overrides: list[str] | None) -> TrainConfig:
    """The configuration a run was started with; overrides may lengthen it. The recipe argument is an override here."""
    from common.rundir import RunDirectory

    directory = run_path(directory)
    run = RunDirectory(directory).open()
    pairs = [*([recipe] if recipe else []), *(overrides or [])]
    data = apply_overrides(read_recipe(str(run.config)), pairs)
    return validate({**data, "runs_dir": str(directory.parent), "run_name": directory.name})


@app.command()
def submit(
    recipe: Annotated[str | None, typer.Argument(help="Recipe name, or a file under --working-dir.")] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="Continue this run directory of the cluster.")] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path, typer.Option(help="Uploaded, less what .gitignore and .rayignore name.")] = Path(),
    stop_on_interrupt: Annotated[bool, typer.Option(help="Ctrl-C stops the job too.")] = False,
    follow: Annotated[str | None, typer.Option(metavar="JOB", help="Submit nothing; follow this job.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="Submit nothing; stop this job.")] = None,
) -> None:
    """Train on a Ray cluster: submit the job, follow its log, exit as it does."""
    from deploy import submit as jobs

    command = ["unigrpo", "train"]
    if resume:
        command += ["--resume", resume, *([recipe] if recipe else []), *(overrides or [])]
    elif not (stop or follow):
        load_config(recipe or "shapes", overrides)  # what is wrong in itself is found before anything is uploaded
        command += [jobs.uploaded(recipe or "shapes", working_dir), *(overrides or [])]
    client = jobs.connect(address)
    if stop:
        typer.echo(f"{stop}: {jobs.stop(client, stop)}")
        return
    job = follow or jobs.submit(client, working_dir, command)
    typer.echo(f"{job}: {address.rstrip('/')}/#/jobs/{job}")
    raise typer.Exit(jobs.follow(client, job, stop_on_interrupt))


@app.command()
def sft(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or a name in deploy/recipes.")],
    overrides: Overrides = None,
) -> None:
    """Supervised fine-tuning: reasoning tokens and flow matching together."""
    from deploy.sft import run_sft

    run_sft(recipe, overrides or [])


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory.")],
    recipe: Annotated[str, typer.Option(help="Recipe whose prompts, rewards and actors are used.")] = "shapes",
    overrides: Overrides = None,
) -> None:
    """Score a checkpoint on the held-out prompts: JSON, a Markdown table and a grid of images with their reasoning."""
    from deploy.evaluation_run import evaluate as run_evaluation
    from deploy.evaluation_run import write_outcome
    from deploy.session import open_evaluation

    # The time makes the name new, so that a checkpoint can be evaluated again.
    called = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).resolve().name)[:70]
    name = f"run_name=eval-{called}-{datetime.now():%Y%m%d-%H%M%S}"
    config = load_config(recipe, [name, *(overrides or []), "steps=0"], _model(model))
    with open_evaluation(config) as session:
        result = run_evaluation(session, step=0)
    table, grid = write_outcome(session, 0, result)
    typer.echo(table.read_text(encoding="utf-8"))
    for path in (session.run.evaluation_file(0), table, grid):
        typer.echo(str(path))


def _model(path: str) -> dict[str, Any]:
    """What makes a checkpoint the model; one that holds its own pipeline takes the place of the recipe's. ConfigError
    for a directory of a run, which holds some."""
    from common.composed.source import INDEX, PIPELINE

    if (Path(path) / "config.yaml").is_file():
        from common.rundir import RunDirectory
        from learner.checkpoint import written

        there = written(RunDirectory(Path(path)).checkpoints)
        remedy = f"give one of its policies, {there[-1] / 'policy'}" if there else "it has no checkpoint yet"
        raise ConfigError(f"{path} is a run directory; {remedy}")
    if (Path(path) / "policy").is_dir():
        raise ConfigError(f"{path} is a checkpoint of a run; give the policy in it, {Path(path) / 'policy'}")
    own = (Path(path) / PIPELINE / INDEX).is_file()
    return {"path": path, **({"pipeline": None} if own else {})}


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory.")],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    number: Annotated[int, typer.Option("-n", min=1, help="Images.")] = 4,
    out: Annotated[Path, typer.Option("-o", help="Directory for the PNGs and the reasoning.")] = Path("generated"),
    recipe: Annotated[str, typer.Option(help="Recipe whose sampling settings are used.")] = "shapes",
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    image: Annotated[Path | None, typer.Option(help="Change this image as the prompt says (BAGEL).")] = None,
) -> None:
    """Reason about a prompt and draw it."""
    from deploy.generate import run_generate

    run_generate(load_config(recipe, model=_model(model)), prompt, number, out, seed, image)


@app.command()
def answer(
    model: Annotated[str, typer.Argument(help="Checkpoint directory in BAGEL's layout, with its vision tower.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[Path, typer.Argument(help="Image file.")],
    recipe: Annotated[str, typer.Option(help="Recipe whose sampling.max_tokens and rollout.dtype hold.")] = "shapes",
) -> None:
    """Answer a question about an image."""
    from deploy.generate import run_answer

    typer.echo(run_answer(load_config(recipe, model=_model(model)), question, image))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest whole one without.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float16 to round the policy to; its fp32 masters without.")
    ] = None,
) -> None:
    """Write a trained policy for other programs: the released layout, reasoner/ for vLLM, vae/ for diffusers."""
    from common.rundir import RunDirectory
    from deploy.export import export as run_export

    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype is {dtype}; give bfloat16, float16 or float32")
    typer.echo(str(run_export(RunDirectory(run_path(run)).open(), out, step, dtype)))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write report.html of a run."""
    from common.rundir import RunDirectory
    from deploy.report import write_report

    typer.echo(str(write_report(RunDirectory(run_path(run)).open())))


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="Run directory of a live run.")],
    rollout_replicas: Annotated[int, typer.Option(min=1, help="Rollout replicas to go on with.")],
) -> None:
    """Change the number of rollout replicas of a live run."""
    from deploy.control import scale as ask

    for name, state in ask(run_path(run), rollout_replicas).items():
        typer.echo(f"{name}: {state}")


@app.command()
def reproduce(
    overrides: Overrides = None,
    rows: Annotated[str, typer.Option(help="Rows, comma-separated; all without.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every training stage.")] = STEPS,
    out: Annotated[Path | None, typer.Option(help="Cells and figures; the page is OUT.md. docs/reproduction.")] = None,
) -> None:
    """Run the paper's rows and ablations, each in several seeds, and write the page that compares them; finished cells
    are kept, and a cell that was cut short goes on."""
    from deploy.reproduction.command import ReproductionError
    from deploy.reproduction.command import reproduce as run
    from deploy.reproduction.rows import Plan, check_out, check_overrides, check_rows, default_out

    numbers = seeds.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"--seeds is {seeds!r}; give numbers such as 0,1,2")
    chosen = check_rows([row.strip() for row in rows.split(",") if row.strip()])
    plan = Plan(
        chosen, tuple(map(int, numbers)), steps, check_overrides(overrides or ()), check_out(out or default_out())
    )
    try:
        typer.echo(str(run(plan, typer.echo)))
    except ReproductionError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def chaos(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or a name in deploy/recipes.")] = "shapes",
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="Kills, one per finished step.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of what is killed and when.")] = 0,
    minutes: Annotated[float, typer.Option(help="No kills after this; the run then goes to its end.")] = 120.0,
) -> None:
    """Train on a small cluster of this machine while killing actors, nodes and the driver; then look for damage."""
    from deploy.chaos.command import OVERRIDES, rage, summary

    config = load_config(recipe, ["run_name=chaos", *OVERRIDES, f"steps={kills + kills // 4 + 2}", *(overrides or [])])
    storm = rage(config, kills, seed, minutes, typer.echo)
    typer.echo(summary(storm, config))
    raise typer.Exit(bool(storm.problems))


@app.command()
def timeline(
    run: Annotated[Path, typer.Argument(help="Run directory of a live run.")],
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end of its step.")] = 600,
) -> None:
    """Write what every actor does in the step that a run is in, for chrome://tracing."""
    from deploy.timeline import ask

    typer.echo(str(ask(run_path(run), wait)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration."""
    typer.echo(json.dumps(TrainConfig.model_json_schema(), indent=2))


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2; a run that stops over NaN, infinity or its
    self-test, code 1."""
    if not os.environ.get("RAY_ADDRESS") or sys.argv[1:2] == ["sft"]:  # which starts its own Ray in any case
        # On this machine alone everything listens on loopback: Ray, which reads this when it is imported and names it
        # after its first use, and the actors' process groups.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (NonFiniteError, SelfTestError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
