"""Before a run trains: are the rollout's chains, seen by the learner, what the rollout says they are?

The same weights must give the same numbers on both sides, up to rounding. What differs says where to look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common import flow
from common.config import Sampling
from common.policy import PolicyOutput
from learner.update import MicroBatch

CHAINS = 4
# A mean of n squared normal draws lies further than this many standard deviations from 1 once in 10^9 times.
NOISE_DEVIATIONS = 6


@dataclass(frozen=True)
class Bounds:
    """What rounding explains: |dlogp| of the tokens, mean and maximum; the RMS difference of an image step's mu, in
    units of the step's std."""

    text_mean: float
    text_max: float
    image: float


BOUNDS = {"float32": Bounds(1e-4, 1e-2, 1e-3), "bfloat16": Bounds(0.05, 1.0, 0.2)}


@dataclass(frozen=True)
class Comparison:
    """Rollout against learner on a few chains: as `Bounds`, the worst image step; whether the window's times lie on
    the learner's schedule; by how many standard deviations the window's noise is too strong or too weak. Learner
    against itself, the greatest difference: again, its pass with gradients against that without; reference, the
    starting policy against the reference."""

    text_mean: float
    text_max: float
    image: float
    on_schedule: bool
    noise: float
    again: float = 0.0
    reference: float = 0.0


@dataclass(frozen=True)
class Seen:
    """One micro-batch of chains, as these weights see it: output, a pass without gradients; again, the same as it is
    when gradients are taken; reference, the reference's, if these weights are where it started."""

    micro: MicroBatch
    output: PolicyOutput
    again: PolicyOutput
    reference: PolicyOutput | None


def _difference(one: PolicyOutput, other: PolicyOutput | None) -> float:
    """Of log-probs and velocities of the same arithmetic: it is 0, or something is wrong."""
    if other is None:
        return 0.0
    pairs = ((one.logprobs, other.logprobs), (one.velocity, other.velocity))
    return float(np.max([(a - b).abs().max().item() for a, b in pairs if a.numel()]))


def compare(seen: Sequence[Seen], sampling: Sampling) -> Comparison:
    """Of chains of the very weights that saw them. A half that was not sampled (no reasoning, no noise) agrees."""
    text = torch.cat([(s.output.logprobs - s.micro.behaviour).abs() for s in seen])
    t, t_next = (torch.cat(times) for times in zip(*((s.micro.packed.t, s.micro.t_next) for s in seen), strict=True))
    image = noise = 0.0
    if sampling.noise_level:
        move = flow.SAMPLERS[sampling.sampler].step(t, t_next, sampling.noise_level)
        x_t, x_next, v, v_old = (
            torch.cat(parts)
            for parts in zip(
                *((s.micro.packed.x_t, s.micro.x_next, s.output.velocity, s.micro.v_old) for s in seen), strict=True
            )
        )
        mean, mean_old = flow.mean_of(move, x_t, v), flow.mean_of(move, x_t, v_old)
        std = move.std[:, None, None]
        image = ((mean - mean_old) / std).square().flatten(1).mean(1).sqrt().max().item()
        z = (x_next - mean_old) / std
        noise = (z.square().mean().item() - 1) / math.sqrt(2 / z.numel())
    schedule = np.array(flow.timesteps(sampling.points, sampling.shift), np.float32)
    place = np.searchsorted(-schedule, -t.cpu().numpy())
    pairs = np.stack([schedule[:-1], schedule[1:]])[:, np.clip(place, 0, len(schedule) - 2)]
    found = torch.stack([t, t_next]).cpu().numpy()
    return Comparison(
        text.mean().item() if len(text) else 0.0,
        text.max().item() if len(text) else 0.0,
        image,
        bool(np.allclose(pairs, found, rtol=0, atol=1e-6)),
        noise,
        float(np.max([_difference(s.output, s.again) for s in seen])),
        float(np.max([_difference(s.output, s.reference) for s in seen])),
    )


def verdict(found: Comparison, dtype: str) -> str | None:
    """What is wrong and which side to look at; None if all is within the bounds of the compute type."""
    bounds = BOUNDS[dtype]
    # Written so that NaN is out of bounds.
    text = not (found.text_mean <= bounds.text_mean and found.text_max <= bounds.text_max)
    image = not found.image <= bounds.image
    numbers = (
        f"text |dlogp| is {found.text_mean:.2g} on average and {found.text_max:.2g} at most (bounds "
        f"{bounds.text_mean:g} and {bounds.text_max:g}), the image steps' means differ by {found.image:.2g} of their "
        f"noise (bound {bounds.image:g}), in {dtype}"
    )
    if not math.isfinite(found.image):
        return f"{numbers}: the images overflow: look at sampling.noise_level, sampling.shift and the compute type"
    if not found.on_schedule:
        return "the window's times are not on the learner's schedule: look at sampling.points and sampling.shift"
    if text and image:
        return f"{numbers}: both halves differ, so the rollout holds other weights: look at how they are published"
    if text:
        return f"{numbers}: the images agree, so look at vLLM's side: its weights, and what it samples from"
    if image:
        return f"{numbers}: the text agrees, so look at the denoiser's side: its weights and its guidance"
    if not abs(found.noise) <= NOISE_DEVIATIONS:
        return (
            f"the window's noise is {found.noise:+.1f} standard deviations off its strength: look at sampling.sampler "
            "and sampling.noise_level on both sides"
        )
    if found.again != 0:
        return (
            f"two passes of the learner over the same chains differ by {found.again:.2g}, so the first ratios would "
            "not be 1: look at its kernels, which must not depend on whether gradients are taken"
        )
    if found.reference != 0:
        return (
            f"the policy differs from the reference that it starts as by {found.reference:.2g}, so the regulariser "
            "would not begin at 0: look at how the learner opens and converts model.path"
        )
    return None
