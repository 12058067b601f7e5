"""A language model and a diffusion transformer as one policy, joined by text: the image sees what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from common.composed.family import Conditioning, Family
from common.lora import plain_weights
from common.policy import Policy, PolicyOutput, score_logits


@dataclass(frozen=True)
class ComposedBatch:
    """One training forward: B texts, P scored tokens, M noised images.

    ids [B, L] padded on the right; row and column [P] where the token before each target stands; targets [P];
    x_t [M, N, D], t [M], owner [M] the row of the conditioning that each image belongs to; grid (rows, cols).
    """

    ids: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    x_t: Tensor
    t: Tensor
    owner: Tensor
    conditioning: Conditioning
    grid: tuple[int, int]


class ComposedPolicy(Policy):
    """`reasoner.*` under transformers' names, `transformer.*` under diffusers'."""

    image_trains_reasoning: ClassVar[bool] = False

    def __init__(self, reasoner: nn.Module, transformer: nn.Module, family: Family) -> None:
        super().__init__()
        self.reasoner, self.transformer, self.family = reasoner, transformer, family

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComposedPolicy:
        """A change of dtype is for what files hold: computed tables, such as rotary frequencies, stay in fp32 as both
        libraries leave them when they load a model in another dtype."""
        stored = self.state_dict().keys()
        tables = {name: buffer for name, buffer in self.named_buffers() if name not in stored}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            path, _, last = name.rpartition(".")
            module = self.get_submodule(path)
            setattr(module, last, table.to(getattr(module, last).device))
        return self

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def vocab_size(self) -> int:
        return int(self.reasoner.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    def score(
        self, ids: Tensor, row: Tensor, column: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """log p(target) [P] and entropy [P] of the tempered softmax after each (row, column) of ids [B, L], fp32."""
        # Padding is on the right, so the causal mask alone hides it. No logits are made of what is never scored.
        first = int(column.min()) if len(column) else ids.shape[1] - 1
        logits = self.reasoner(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        return score_logits(logits[row, column - first], targets, temperature)

    def token_logprobs(self, texts: list[list[int]]) -> list[Tensor]:
        device = next(self.reasoner.parameters()).device
        layout = lay_out_texts(texts, [(1, len(text)) for text in texts], device)
        return list(self.score(*layout)[0].split([len(text) - 1 for text in texts]))

    def velocity(self, x_t: Tensor, t: Tensor, context: Conditioning, grid: tuple[int, int]) -> Tensor:
        dtype = next(self.transformer.parameters()).dtype
        return self.family.velocity(self.transformer, x_t.to(dtype), t.float(), context, grid).float()

    def forward(self, batch: Any, image_grad_to_text: bool = True, temperature: float = 1.0) -> PolicyOutput:
        """image_grad_to_text has no meaning here: the image reads the text as words, which carry no gradient."""
        logprobs, entropy = self.score(batch.ids, batch.row, batch.column, batch.targets, temperature)
        velocity = self.velocity(batch.x_t, batch.t, batch.conditioning.take(batch.owner), batch.grid)
        return PolicyOutput(logprobs, entropy, velocity)

    def recompute_activations(self) -> None:
        self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        self.reasoner.gradient_checkpointing_enable()  # type: ignore[operator]
        for module in self.reasoner.modules():
            # transformers recomputes in training mode only, and the rest of the model must not leave evaluation mode.
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def keep_for_drawing(self) -> None:
        self.reasoner.to("cpu")

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"reasoning": [], "denoising": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["reasoning" if name.startswith("reasoner.") else "denoising"].append((name, parameter))
        return groups

    def reasoning_weights(self) -> Iterator[tuple[str, Tensor]]:
        # Parameters rather than the state, which names a tied head, too.
        yield from plain_weights(self.reasoner, dict(self.reasoner.named_parameters()))


def lay_out_texts(
    texts: list[list[int]], scored: list[tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, row, column, targets of a ComposedBatch; scored[b] = (first, end) of the tokens of text b to predict."""
    ids = torch.zeros(len(texts), max(len(text) for text in texts), dtype=torch.long)
    for b, text in enumerate(texts):
        ids[b, : len(text)] = torch.tensor(text)
    scored_at = [(b, k) for b, (first, end) in enumerate(scored) for k in range(first, end)]
    place = torch.tensor(scored_at, dtype=torch.long)  # no floats where nothing is scored
    row, column = place.view(-1, 2).unbind(1)
    return ids.to(device), row.to(device), (column - 1).to(device), ids[row, column].to(device)
