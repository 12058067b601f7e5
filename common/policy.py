"""What a unified policy is to rollout and learner, and how one is opened. `bagel` and `composed` implement it.

A policy reads token ids and gives log-probabilities; it reads a context and gives velocities. `OpenPolicy` holds it
together with its frozen parts: the chat format, the autoencoder and, for a composed policy, the text encoders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.composed.source import composed_source
from common.config import Cfg, ConfigError, Model, resolve_path


class Chat(Protocol):
    """Token ids of a conversation."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens of which any ends a reasoning."""

    def prompt_ids(self, prompt: str, system: str = "", think: bool = True) -> list[int]:
        """What the reasoning is sampled from; without reasoning, what the image is conditioned on."""

    def context_ids(self, prompt_ids: list[int], response_ids: list[int]) -> list[int]:
        """What the image is conditioned on, for `OpenPolicy.context`; the prompt alone if there is no response."""

    def decode(self, ids: list[int]) -> str:
        """Text for people."""


class Batch(Protocol):
    """One training forward as a policy lays it out; besides, noised images x_t [M, N, D] at times t [M]."""

    @property
    def x_t(self) -> Tensor: ...

    @property
    def t(self) -> Tensor: ...


@dataclass(frozen=True)
class PolicyOutput:
    """log p of each target [P], entropy of each distribution [P], velocity [M, N, D]; all fp32."""

    logprobs: Tensor
    entropy: Tensor
    velocity: Tensor


def score_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """logits [P, V] -> log p(target) [P] and entropy [P] of the tempered softmax, fp32."""
    logp = F.log_softmax(logits.float() / temperature, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class Policy(nn.Module, ABC):
    """Text log-probs and velocities from one set of weights. M images of N latent tokens with D numbers."""

    image_trains_reasoning: ClassVar[bool] = True
    """Whether a gradient goes from an image into what read its text."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def token_logprobs(self, texts: list[list[int]]) -> list[Tensor]:
        """log p of every token after the first, one fp32 tensor [len - 1] per text."""

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, context: Any, grid: tuple[int, int]) -> Tensor:
        """x_t [M, N, D] at times t [M] in [0, 1], context of M rows -> v = noise - data [M, N, D], fp32."""

    @abstractmethod
    def forward(self, batch: Any, image_grad_to_text: bool = True, temperature: float = 1.0) -> PolicyOutput:
        """The packed forward of the learner: every text once, all images of all chains together."""

    @abstractmethod
    def recompute_activations(self) -> None:
        """From here on training keeps what enters each layer only and computes the rest again in the backward."""

    def keep_for_drawing(self) -> None:
        """Moves what velocities do not need to host memory, where it goes on answering `token_logprobs`. Nothing moves
        where one decoder does both."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by role, `reasoning` and `denoising`."""

    @abstractmethod
    def reasoning_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What the reasoning engine loads, under its names, adapters merged; a tied head comes once."""


@dataclass(frozen=True)
class Guidance:
    """Guidance of a batch: its settings and, for every chain, the ids without the prompt and without the reasoning."""

    cfg: Cfg
    without_prompt: list[list[int]]
    without_reasoning: list[list[int]]


class OpenPolicy(ABC):
    """A policy with its frozen parts, as read from files."""

    policy: Policy
    chat: Chat

    @property
    @abstractmethod
    def token_dim(self) -> int:
        """D, numbers in one latent token."""

    @property
    @abstractmethod
    def reasoner(self) -> dict[str, Any] | Path:
        """Where the reasoning engine starts from: a directory in transformers' layout, or, where the reasoner has
        none of its own, the description of its decoder."""

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent tokens (rows, columns) of an image in pixels; ValueError if the size does not fit."""

    @abstractmethod
    def context(self, texts: list[list[int]]) -> Any:
        """What images attend to, one row per list of `Chat.context_ids`."""

    def velocities(
        self, texts: list[list[int]], grid: tuple[int, int], guidance: Guidance | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """v(x_t [M, N, D], t [M]) of images conditioned on M texts, which are read once."""
        context = self.context(texts)
        return lambda x_t, t: self.policy.velocity(x_t, t, context, grid)

    def guidance(self, prompts: list[str], system: str, cfg: Cfg) -> Guidance:
        """What `velocities` needs to guide the images of these prompts. ConfigError if the policy has no guidance."""
        raise ConfigError(f"cfg.text_scale is {cfg.text_scale}: this kind of model has no guidance; give 1")

    @abstractmethod
    def pack(
        self,
        texts: Sequence[tuple[list[int], list[int]]],
        x_t: Tensor,
        t: Tensor,
        owner: Tensor,
        grid: tuple[int, int],
        guidance: Guidance | None = None,
    ) -> Batch:
        """Lays out one forward: B (prompt ids, response ids), of which the responses are scored, and M images x_t
        [M, N, D] at times t [M], each conditioned on text owner [M]; on the device to use. guidance, of the B texts:
        their images are guided."""

    @abstractmethod
    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latent tokens [M, N, D] -> images uint8 [M, H, W, 3]."""

    def pixels(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latent tokens [M, N, D] -> images [M, 3, H, W], about [-1, 1], with a gradient; ConfigError without one."""
        raise ConfigError("algorithm is refl: this kind of model decodes without a gradient; use unigrpo")

    @abstractmethod
    def save(self, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a directory that `open_policy` reads; weights, by the policy's names, replace its own."""


@dataclass(frozen=True)
class Outline:
    """What is known of a policy before its tensors are read: chat, positions of its decoder, `grid` and `token_dim` as
    above; skeleton: the policy without numbers (meta tensors); guided: whether its images can be guided."""

    chat: Chat
    positions: int
    grid: Callable[[int, int], tuple[int, int]]
    token_dim: int
    skeleton: Callable[[], Policy]
    guided: bool = True


def directories(model: Model) -> list[Path]:
    """Where everything lies that a policy is read from."""
    return [resolve_path(path) for path in (model.path, model.pipeline) if path]


def outline(model: Model) -> Outline:
    """A cheap look before anything starts: files, sizes, tokenizer. ConfigError or CheckpointError."""
    if source := composed_source(model):
        from common.composed import checkpoint as composed

        return composed.check(source)
    from common.bagel import checkpoint as bagel
    from common.bagel.text import ChatTokenizer

    directory = resolve_path(model.path)
    config = bagel.check(directory)
    llm = config.llm_config
    chat = ChatTokenizer.read(directory, llm.vocab_size)
    return Outline(
        chat,
        llm.max_position_embeddings,
        config.grid,
        config.token_dim,
        lambda: bagel.skeleton(config, chat),
    )


def open_policy(
    model: Model,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    frozen: torch.dtype | None = torch.float32,
) -> OpenPolicy:
    """Loads the policy that a recipe's `model` names. Raises ConfigError or CheckpointError; nothing is half loaded.

    dtype: of what is trained; frozen: of text encoders and autoencoder, None to leave them out (then only `policy` is
    of use). BAGEL has but a small autoencoder, which always comes, in fp32.
    """
    if source := composed_source(model):
        from common.composed import checkpoint as composed

        return composed.load(source, dtype, device, frozen)
    from common.bagel import checkpoint as bagel

    return bagel.load(resolve_path(model.path), dtype, device)
