"""What travels between the rooms: prompts, chains and groups, as immutable numpy records.

One chain is prompt -> reasoning tokens -> latents -> image, stored as an ordered list of segments. N latent tokens of D
numbers, K window steps. Arrays travel through Ray's object store without a copy and go to disk as Parquet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Cfg


class NonFiniteError(RuntimeError):
    """A reward, a loss or a gradient is NaN or infinite and on_nonfinite is stop; the weights are as they were."""


class SelfTestError(RuntimeError):
    """Rollout and learner do not see the same chains; nothing was trained."""


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file: the text, its GenEval-like metadata (tag, include, exclude), and a unique id."""

    id: str
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class TextSegment:
    """Sampled reasoning; none (K = 0) where the policy draws at once. ids [K] int64 with EOS; logprobs [K] fp32 under
    the distribution sampled from; prompt_ids [P] int64 what came before; finished: stopped at EOS rather than at the
    token limit; text: decoded, for people; version: the oldest weights that sampled any of them."""

    prompt_ids: NDArray[np.int64]
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finished: bool
    text: str
    version: int


@dataclass(frozen=True)
class ImageSegment:
    """A drawn image and, for the steps of the SDE window, what the objective needs.

    x_t and x_next [K, N, D] fp32 before and after each step, v_old [K, N, D] fp32 the velocity it was sampled with,
    t and t_next [K] times, pixels [H, W, 3] uint8. K is 0 in evaluation, where every step is deterministic.
    """

    x_t: NDArray[np.float32]
    x_next: NDArray[np.float32]
    v_old: NDArray[np.float32]
    t: NDArray[np.float32]
    t_next: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    grid: tuple[int, int]
    version: int


Segment = TextSegment | ImageSegment


@dataclass(frozen=True)
class Chain:
    """One sample: its segments in order and the seed that made them."""

    segments: tuple[Segment, ...]
    seed: int

    @property
    def text(self) -> TextSegment:
        """The last reasoning."""
        return next(s for s in reversed(self.segments) if isinstance(s, TextSegment))

    @property
    def image(self) -> ImageSegment:
        """The last image, the one that is scored."""
        return next(s for s in reversed(self.segments) if isinstance(s, ImageSegment))


@dataclass(frozen=True)
class Group:
    """All chains of one prompt in one step. They share the SDE window."""

    prompt: Prompt
    step: int
    chains: tuple[Chain, ...]


@dataclass(frozen=True)
class RolloutRequest:
    """Asks a replica for one group. seeds [G] one per chain; window: first step and number of SDE steps, None for
    deterministic sampling; points: time points of the schedule (steps + 1); cfg: guidance, None is without; start:
    seed of the initial noise that all chains share, None where each has its own."""

    prompt: Prompt
    step: int
    seeds: tuple[int, ...]
    window: tuple[int, int] | None
    points: int
    cfg: Cfg | None = None
    start: int | None = None


@dataclass(frozen=True)
class Rewards:
    """Scores of one group's chains by one scorer. values [G] fp32, NaN where a chain could not be scored; nonfinite:
    how many of those are because the scorer said NaN or infinity; components: further columns for the record (never
    trained on)."""

    scorer: str
    values: NDArray[np.float32]
    components: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    nonfinite: int = 0


@dataclass(frozen=True)
class WeightBucket:
    """Tensors that travel together, in order: names, shapes and a 64-bit digest of each one's bytes."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    digests: tuple[int, ...]


@dataclass(frozen=True)
class WeightManifest:
    """One published version: the dtype of all weights, and the buckets, which hold every weight once."""

    version: int
    dtype: str
    buckets: tuple[WeightBucket, ...]

    @cached_property
    def checksum(self) -> str:
        """One value for the content, whatever the version: of the names, shapes and digests."""
        return hashlib.blake2b(repr((self.dtype, self.buckets)).encode(), digest_size=16).hexdigest()

    def differences(self, other: WeightManifest) -> list[str]:
        """Names of the weights that other, of the same layout, holds differently."""
        pairs = zip(self.buckets, other.buckets, strict=True)
        return [
            name
            for mine, theirs in pairs
            for name, a, b in zip(mine.names, mine.digests, theirs.digests, strict=True)
            if a != b
        ]

    def changed_since(self, before: WeightManifest | None) -> list[int]:
        """Which buckets whoever holds `before` needs; all of them for None."""
        have = set(before.buckets) if before and before.dtype == self.dtype else set()
        return [index for index, bucket in enumerate(self.buckets) if bucket not in have]


@dataclass(frozen=True)
class RolloutStats:
    """What one call to a replica produced: the weight version, chains, reasoning tokens, reasonings cut at their limit,
    the seconds of each half, and when it began (Unix time)."""

    version: int
    chains: int
    tokens: int
    truncated: int
    reasoning_s: float
    drawing_s: float
    started: float


def chain_seed(run_seed: int, step: int, prompt_index: int, chain_index: int) -> int:
    """A seed that no other chain of the run has: noise and sampling depend on it alone, so that any replica redraws
    the same chain, and a resumed run continues as if it had not stopped."""
    return derived_seed(run_seed, step, prompt_index, chain_index)


def derived_seed(*numbers: int) -> int:
    """A seed of 62 bits for a stream of its own for these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)
