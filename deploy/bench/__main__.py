"""`make bench`: speed against this machine's own limits, all in one run, as a Markdown table.

Fractions are model floating-point operations (counted from shapes, common/bagel/flops.py) per second over the matrix
rate measured in the same run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from common.runtime import thread_env

CPUS = len(os.sched_getaffinity(0))
os.environ.update(thread_env(CPUS))

import numpy as np  # noqa: E402 (the thread count must be set before torch is imported)
import torch  # noqa: E402

from common.bagel.config import BagelConfig  # noqa: E402
from common.bagel.flops import draw_flops, read_flops  # noqa: E402
from common.bagel.policy import pack_batch  # noqa: E402
from common.config import TrainConfig, resolve_path  # noqa: E402
from common.hardware import cpu_has_bfloat16  # noqa: E402
from common.recipe import load_config  # noqa: E402
from common.weights import digest, held_bucket, pack, plan, unpack  # noqa: E402
from deploy.bench.measure import MIDDLE, bagel_config, best, matrix_rate, random_policy  # noqa: E402
from deploy.bench.packed import compare, random_work  # noqa: E402

GRID, CONTEXT, SCORED, WINDOW = (16, 16), 64, 40, 3


def model_rates(dtype: torch.dtype, chains: int) -> dict[str, float]:
    """Operations per second of the denoiser's step and of the learner's packed forward and backward."""
    policy = random_policy(bagel_config(MIDDLE, 16), dtype)
    n, d = GRID[0] * GRID[1], policy.config.token_dim
    texts = [torch.randint(5, 4096, (CONTEXT,)).tolist() for _ in range(chains)]
    with torch.no_grad():
        context = policy.prefill(texts)
        x, t = torch.randn(chains, n, d), torch.full((chains,), 0.5)
        drawing = best(lambda: policy.velocity(x, t, context, GRID), 3)
    owner = torch.arange(chains).repeat_interleave(WINDOW)
    images = len(owner)
    batch = pack_batch(
        texts, [(CONTEXT - SCORED, CONTEXT)] * chains, torch.randn(images, n, d), torch.rand(images), owner, GRID
    )

    def update() -> None:
        output = policy(batch)
        (output.logprobs.mean() + output.velocity.square().mean()).backward()
        policy.zero_grad(set_to_none=True)

    forward = chains * read_flops(policy.config, CONTEXT, SCORED) + images * draw_flops(policy.config, n, CONTEXT)
    return {
        "denoiser": chains * draw_flops(policy.config, n, CONTEXT) / drawing,
        "learner": 3 * forward / best(update, 2),
    }


def sync_rates() -> dict[str, float]:
    """GB/s of 40 M fp32 weights: packed, copied into another policy and proved to be there, in one process; of the
    digest alone, and of a plain memory copy."""
    policy, other = (random_policy(bagel_config(MIDDLE, 16), torch.float32) for _ in range(2))
    weights, held = dict(policy.named_parameters()), other.state_dict()
    names = plan({name: tuple(p.shape) for name, p in weights.items()}, torch.float32, 64 << 20)
    size = sum(p.numel() * p.itemsize for p in weights.values())
    scratch, flat, target = (torch.empty(size + 8 * len(weights), dtype=torch.uint8) for _ in range(3))

    def sync() -> None:
        for part in names:
            bucket, packed = pack(((name, weights[name]) for name in part), torch.float32, scratch)
            for name, tensor in unpack(bucket, packed, torch.float32):
                held[name].copy_(tensor)
            assert held_bucket(bucket, held) == bucket

    seconds = {
        "sync": best(sync, 3),
        "digest": best(lambda: digest(flat[:size]), 5),
        "copy": best(lambda: target.copy_(flat), 5),
    }
    return {what: size / value / 1e9 for what, value in seconds.items()}


def reasoner_rate(config: TrainConfig) -> float:
    """Tokens per second of vLLM on the small policy: 96 requests of 32 tokens."""
    from common.bagel import checkpoint as store
    from rollout.reasoner import Reasoner
    from rollout.reasoner_dir import write_reasoner_dir

    loaded = store.load(resolve_path(config.model.path))
    with tempfile.TemporaryDirectory() as scratch:
        write_reasoner_dir(Path(scratch) / "r", loaded.reasoner, loaded.policy.reasoning_weights())
        # <|endoftext|>, which this policy never says: every request runs to its limit.
        unused = loaded.chat.tokenizer.token_to_id("<|endoftext|>")
        assert unused is not None
        reasoner = Reasoner(Path(scratch) / "r", eos_token_id=unused, max_model_len=128, max_batch=96)
        prompts = [loaded.chat.prompt_ids("a photo of three red circles")] * 96
        return 96 * 32 / best(lambda: reasoner.generate(prompts, list(range(96)), max_tokens=32), 3)


def step_overhead(steps: int = 6) -> dict[str, float]:
    """A short run of the default recipe: medians over its steps, the first left out."""
    from deploy.loop import train
    from deploy.session import open_session

    with tempfile.TemporaryDirectory() as runs:
        config = load_config("shapes", [f"steps={steps}", f"runs_dir={runs}", "evaluation.prompts=7"])
        with open_session(config) as session:
            rows = train(session).read_metrics()[1:]
    keys = [key for key in rows[0] if key.startswith(("time/", "rollout/"))]
    return {key: float(np.median([row[key] for row in rows])) for key in keys}


def plan_against_step(steps: int = 4) -> None:
    """What `deploy.plan` predicts for the default recipe from this machine's matrix and copy rates, and what is so."""
    from common.sizes import sizes_of
    from deploy.devices import Device
    from deploy.plan import step_time

    config = load_config("shapes")
    before = matrix_rate(getattr(torch, config.learner.dtype))
    measured = step_overhead(steps)
    rate = (before + matrix_rate(getattr(torch, config.learner.dtype))) / 2
    copy = sync_rates()["copy"]
    # Replicas, then ranks, share the CPUs that the rate was measured on.
    core = Device(rate / config.learner.ranks / 1e12, 0, copy / config.learner.ranks, copy)
    tokens = round(measured["rollout/tokens_per_s"] / measured["rollout/images_per_s"])
    predicted = step_time(config, sizes_of(config), core, tokens)
    pairs = {
        "rollout": (predicted.reasoning + predicted.drawing, measured["time/rollout_s"]),
        "update": (predicted.update, measured["time/update_s"]),
        "step": (predicted.total, measured["time/step_s"]),
    }
    for name, (expected, found) in pairs.items():
        show(
            f"plan, default recipe, {name}",
            f"{expected:.2f} s predicted, {found:.2f} s measured: {expected / found:.2f}",
        )


def show(what: str, value: str) -> None:
    """Prints one row at once: a run that is cut short has still said something."""
    print(f"| {what} | {value} |", flush=True)


def compute_types() -> tuple[torch.dtype, ...]:
    """What this CPU multiplies itself: where torch emulates bf16 the large policy would take hours."""
    return (torch.float32, torch.bfloat16) if cpu_has_bfloat16() else (torch.float32,)


def packed_against_plain(chains: int = 24) -> None:
    """The learner's packed forward and backward at the paper's group and window, on the small and the 40 M policy."""
    small, middle = BagelConfig.read(resolve_path("deploy/models/shapes")), bagel_config(MIDDLE, 16)
    # The whole group of the 40 M policy at once keeps 4 GB of activations, which a CPU pays for page by page.
    for name, config, context, scored, grid, repeat, micro in (
        ("small", small, (44, 72), 32, (4, 4), 5, 24),
        ("40 M", middle, (CONTEXT, CONTEXT), SCORED, GRID, 1, 4),
    ):
        work = random_work(config, chains=chains, window=WINDOW, context=context, scored=scored, grid=grid)
        for dtype in compute_types():
            for what, measured in compare(random_policy(config, dtype), work, repeat, micro):
                show(f"{name}, {str(dtype).removeprefix('torch.')}: {what}", measured)


def rates() -> None:
    """Matrix, denoiser, learner, weight sync, vLLM and a whole step."""
    for dtype in compute_types():
        name, rate = str(dtype).removeprefix("torch."), matrix_rate(dtype)
        show(f"matrix rate, {name}, {CPUS} threads", f"{rate / 1e9:.0f} GFLOP/s")
        for part, measured in model_rates(dtype, 4).items():
            show(f"{part}, 40 M policy, {name}", f"{measured / 1e9:.0f} GFLOP/s = {measured / rate:.2f} of it")
    sync = sync_rates()
    show(
        "weight sync (pack, load, both proved by digest), 40 M fp32",
        f"{sync['sync']:.2f} GB/s; digest {sync['digest']:.2f} GB/s, memory copy {sync['copy']:.2f} GB/s",
    )
    overhead = step_overhead()
    show("vLLM, small policy, 96 x 32 tokens", f"{reasoner_rate(load_config('shapes')):.0f} tokens/s")
    show("default recipe, one step", f"{overhead['time/step_s']:.2f} s")
    show("share of a step that is not model math", f"{overhead['time/overhead_fraction']:.3f}")
    show("weight sync of a step (time/sync_s)", f"{overhead['time/sync_s'] * 1000:.0f} ms")
    show("rollout", f"{overhead['rollout/images_per_s']:.1f} images/s")


SECTIONS = {"rates": rates, "packed": packed_against_plain, "plan": plan_against_step}


def main() -> None:
    """Prints the sections named on the command line, or all."""
    torch.set_num_threads(CPUS)
    torch.manual_seed(0)
    print("| what | measured |\n|---|---|", flush=True)
    if not cpu_has_bfloat16():
        show("bfloat16", "left out: this CPU does not multiply it")
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()


if __name__ == "__main__":
    main()
