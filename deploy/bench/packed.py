"""The learner's packed forward against the plain one, on the same chains: loss, gradients, time, operations.

Plain is one chain and one window step at a time: each step reads its chain's text again and goes back alone. Both take
the on-policy gradient of the joint objective, A (mean over tokens of log p - mean over steps and dimensions of z v):
at ratio 1, RatioNorm's log ratio is -mean(z (mu_old - mu)), whose gradient is that of -z v up to the step's constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.bagel.config import BagelConfig
from common.bagel.flops import draw_flops, read_flops
from common.bagel.policy import BagelPolicy, PackedBatch, PolicyOutput, pack_batch
from deploy.bench.measure import best, matrix_rate


@dataclass(frozen=True)
class Work:
    """C chains: token lists of which the last `scored` are the reasoning, and K window steps of each.

    x_t and z [C, K, N, D], t [C, K], advantage [C], all fp32 on the device to use.
    """

    texts: list[list[int]]
    scored: int
    x_t: Tensor
    z: Tensor
    t: Tensor
    advantage: Tensor
    grid: tuple[int, int]

    @property
    def chains(self) -> int:
        return len(self.texts)

    @property
    def window(self) -> int:
        return self.t.shape[1]


def random_work(
    config: BagelConfig,
    *,
    chains: int,
    window: int,
    context: tuple[int, int],
    scored: int,
    grid: tuple[int, int],
    device: str = "cpu",
) -> Work:
    """Chains of random tokens, latents and advantages; context: shortest and longest text."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, shape = config.llm_config.vocab_size, (chains, window, grid[0] * grid[1], config.token_dim)
    lengths = torch.randint(context[0], context[1] + 1, (chains,), generator=generator).tolist()
    texts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    x_t, z = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    t, advantage = torch.rand(chains, window, generator=generator), torch.randn(chains, generator=generator)
    return Work(texts, scored, x_t, z, t.to(device), advantage.to(device), grid)


def _batch(work: Work, chains: range, steps: range, score: bool) -> PackedBatch:
    texts = [work.texts[c] for c in chains]
    span = [(len(text) - work.scored if score else len(text), len(text)) for text in texts]
    rows, columns = slice(chains.start, chains.stop), slice(steps.start, steps.stop)
    owner = torch.arange(len(texts), device=work.t.device).repeat_interleave(len(steps))
    x_t, t = work.x_t[rows, columns].flatten(0, 1), work.t[rows, columns].flatten()
    return pack_batch(texts, span, x_t, t, owner, work.grid)


def _loss(work: Work, output: PolicyOutput, chains: range, steps: range) -> Tensor:
    """This part's share of the mean over all chains."""
    rows, columns = slice(chains.start, chains.stop), slice(steps.start, steps.stop)
    advantage = work.advantage[rows]
    noise = work.z[rows, columns].flatten(0, 1)
    image = -(noise * output.velocity).flatten(1).mean(1).view(len(chains), len(steps)).sum(1) / work.window
    loss = -(advantage * image).sum()
    if len(output.logprobs):
        loss = loss - (advantage * output.logprobs.view(len(chains), -1).mean(1)).sum()
    return loss / work.chains


def packed(policy: BagelPolicy, work: Work, micro: int | None = None) -> float:
    """All chains and steps together, or `micro` chains at a time; adds to the gradients and returns the loss."""
    steps, micro = range(work.window), micro or work.chains
    parts = ((range(c, min(c + micro, work.chains)), steps, True) for c in range(0, work.chains, micro))
    return _backward(policy, work, parts)


def plain(policy: BagelPolicy, work: Work) -> float:
    """One chain and one step at a time; adds to the gradients and returns the loss."""
    parts = ((range(c, c + 1), range(k, k + 1), k == 0) for c in range(work.chains) for k in range(work.window))
    return _backward(policy, work, parts)


def _backward(policy: BagelPolicy, work: Work, parts: Iterator[tuple[range, range, bool]]) -> float:
    total = torch.zeros((), device=work.t.device)
    for chains, steps, score in parts:
        loss = _loss(work, policy(_batch(work, chains, steps, score)), chains, steps)
        loss.backward()
        total += loss.detach()
    return float(total)


def packed_flops(config: BagelConfig, work: Work) -> int:
    """Forward and backward of every text once and every image once."""
    image = work.grid[0] * work.grid[1]
    return 3 * sum(
        read_flops(config, len(text), work.scored) + work.window * draw_flops(config, image, len(text))
        for text in work.texts
    )


def plain_flops(config: BagelConfig, work: Work) -> int:
    """The same with every text read once per window step."""
    again = 3 * (work.window - 1) * sum(read_flops(config, len(text)) for text in work.texts)
    return packed_flops(config, work) + again


@dataclass(frozen=True)
class Pass:
    """One way to do the work: wall seconds, operations, the loss, the gradients by name, peak bytes on a GPU."""

    seconds: float
    flops: int
    loss: float
    gradients: dict[str, Tensor]
    peak_bytes: int | None


def run_pass(policy: BagelPolicy, function: Callable[[], float], flops: int, repeat: int) -> Pass:
    """Loss and gradients of one call, then the time of the fastest of `repeat`. Clears the gradients."""
    policy.zero_grad(set_to_none=True)
    cuda = policy.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    loss = function()
    gradients = {name: p.grad.float().cpu() for name, p in policy.named_parameters() if p.grad is not None}
    peak = torch.cuda.max_memory_allocated() if cuda else None
    seconds = best(function, repeat, policy.device.type, warm=False)
    policy.zero_grad(set_to_none=True)
    return Pass(seconds, flops, loss, gradients, peak)


def difference(one: Pass, other: Pass) -> float:
    """Largest difference of a gradient's entries, relative to the largest entry of that parameter's gradient."""
    return max(
        float((gradient - other.gradients[name]).abs().max() / gradient.abs().max().clamp_min(1e-30))
        for name, gradient in one.gradients.items()
    )


def compare(policy: BagelPolicy, work: Work, repeat: int = 2, micro: int | None = None) -> list[tuple[str, str]]:
    """Both ways and the matrix rate, one after the other on the policy's own device and type: (what, measured).

    micro: chains of one packed forward, as learner.chains_per_micro_batch; all without it.
    """
    config = policy.config
    rate = matrix_rate(policy.vae2llm.weight.dtype, policy.device.type)
    ways = {
        "packed": run_pass(policy, lambda: packed(policy, work, micro), packed_flops(config, work), repeat),
        "plain": run_pass(policy, lambda: plain(policy, work), plain_flops(config, work), repeat),
    }
    rows = []
    for name, way in ways.items():
        speed = way.flops / way.seconds
        peak = f", peak {way.peak_bytes / 1e9:.1f} GB" if way.peak_bytes else ""
        share = f"{speed / 1e9:.0f} GFLOP/s = {speed / rate:.2f} of the matrix rate"
        rows.append((name, f"{way.seconds:.3f} s, {way.flops / 1e9:.1f} GFLOP, {share}{peak}"))
    one, other = ways["packed"], ways["plain"]
    gap, gradients = abs(one.loss - other.loss), difference(one, other)
    faster = f"{other.seconds / one.seconds:.1f}x as fast; loss differs by {gap:.0e}, gradients by {gradients:.0e}"
    return [*rows, ("packed against plain", faster)]
