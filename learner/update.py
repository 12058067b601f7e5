"""One joint update: advantages shared by both halves of a chain, one packed forward, one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import flow
from common.config import TrainConfig
from common.policy import Batch, Guidance, OpenPolicy, PolicyOutput
from common.types import Chain, Prompt
from learner import objective
from learner.engine import Engine
from learner.reference import HostReference


@dataclass(frozen=True)
class MicroBatch:
    """C chains laid out for one forward. M = C * K images, P scored tokens.

    packed: texts and images; advantage [C]; weight [C] 1 or 0 (a chain that only keeps ranks in step); finished [C]
    whether the reasoning ended by itself; token_owner [P] the chain of each token; behaviour [P] the rollout's
    log-probs; x_next, v_old [M, N, D]; t, t_next [M]; on_policy [C] whether a chain was made by the very weights that
    are being updated; grid: latent tokens (rows, columns) of an image; prompts: what each chain was asked, where the
    caller says.
    """

    packed: Batch
    advantage: Tensor
    weight: Tensor
    finished: Tensor
    token_owner: Tensor
    behaviour: Tensor
    x_next: Tensor
    v_old: Tensor
    t_next: Tensor
    window: int
    on_policy: Tensor
    grid: tuple[int, int]
    prompts: tuple[Prompt, ...]

    @property
    def chains(self) -> int:
        return len(self.advantage)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, K): what a number per image is viewed as."""
        return self.chains, self.window


@dataclass(frozen=True)
class OldPolicy:
    """What the ratio is taken against: log-probs [P] and velocities [M, N, D]."""

    logprobs: Tensor
    velocity: Tensor


def lay_out(
    chains: list[Chain],
    advantages: list[float],
    weights: list[float],
    opened: OpenPolicy,
    version: int,
    device: str,
    prompts: Sequence[Prompt] = (),
    guidance: Guidance | None = None,
) -> MicroBatch:
    """Chains -> tensors of one forward; guidance: that of the chains, if they were drawn with it."""
    texts, behaviour, owner = [], [], []
    for number, chain in enumerate(chains):
        prompt, ids = chain.text.prompt_ids.tolist(), chain.text.ids.tolist()
        texts.append((prompt, ids))
        behaviour.append(chain.text.logprobs)
        owner += [number] * len(ids)
    window = len(chains[0].image.t)

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(chain.image, name) for chain in chains])).to(device)

    image_owner = torch.arange(len(chains), device=device).repeat_interleave(window)
    packed = opened.pack(texts, stack("x_t"), stack("t"), image_owner, chains[0].image.grid, guidance)
    return MicroBatch(
        packed,
        torch.tensor(advantages, dtype=torch.float32, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        torch.tensor([chain.text.finished for chain in chains], device=device),
        torch.tensor(owner, dtype=torch.long, device=device),
        torch.from_numpy(np.concatenate(behaviour)).to(device),
        stack("x_next"),
        stack("v_old"),
        stack("t_next"),
        window,
        torch.tensor([chain.text.version == chain.image.version == version for chain in chains], device=device),
        chains[0].image.grid,
        tuple(prompts),
    )


@dataclass(frozen=True)
class Share:
    """The chains of one rank: (group, chain) pairs by minibatch and micro-batch; weight 0 where a pair only keeps the
    ranks' number of forwards equal; total: contributing chains of all ranks by minibatch."""

    pieces: list[list[list[tuple[int, int, float]]]]
    total: list[int]


def share_out(mask: NDArray[np.bool_], rank: int, ranks: int, minibatches: int, micro: int) -> Share:
    """Deals the contributing chains (mask [B, G]) in order: equal runs per minibatch, then per rank, then cut into
    micro-batches. Every rank gets the same number of micro-batches, since each one is a collective."""
    pairs = [(int(b), int(g)) for b, g in zip(*np.nonzero(mask), strict=True)]
    pieces, total = [], []
    for part in np.array_split(np.arange(len(pairs)), minibatches):
        runs = np.array_split(part, ranks)
        forwards = max(1, math.ceil(len(runs[0]) / micro)) if len(part) else 0
        mine = [(*pairs[i], 1.0) for i in runs[rank]]
        if len(part) and len(mine) < forwards:
            mine += [(*pairs[part[0]], 0.0)] * (forwards - len(mine))
        cuts = np.array_split(np.arange(len(mine)), forwards) if forwards else []
        pieces.append([[mine[i] for i in cut] for cut in cuts])
        total.append(len(part))
    return Share(pieces, total)


class Updater:
    """Turns chains with advantages into one or more optimizer steps and the metrics of the step."""

    def __init__(
        self,
        engine: Engine,
        reference: Callable[..., PolicyOutput] | None,
        config: TrainConfig,
        image_bound: float,
        ranks: int,
    ) -> None:
        self.engine, self.reference, self.config = engine, reference, config
        self.image_bound, self.ranks = image_bound, ranks
        self.sampler = flow.SAMPLERS[config.sampling.sampler]

    def run(self, minibatches: list[list[MicroBatch]], totals: list[int]) -> dict[str, float]:
        """epochs x minibatches optimizer steps. totals: contributing chains of all ranks per minibatch.

        Returns sums over this rank's chains and steps, keys "sum/..." and "count/..."; the caller adds up ranks.
        """
        reference = self.references(minibatches)
        # Until the first optimizer step the weights of the gradient pass are the old policy's: its own output serves.
        old: list[list[OldPolicy | None]] = [
            [self._old(micro) if number else None for micro in mini] for number, mini in enumerate(minibatches)
        ]
        lengths = [self._mean_length(mini, total) for mini, total in zip(minibatches, totals, strict=True)]
        sums: dict[str, float] = {}
        for _ in range(self.config.objective.epochs):
            for mini, olds, refs, total, length in zip(minibatches, old, reference, totals, lengths, strict=True):
                for position, (micro, ref) in enumerate(zip(mini, refs, strict=True)):
                    loss, stats, olds[position] = self._loss(micro, olds[position], ref, total, length)
                    self.engine.backward(loss, last=position == len(mini) - 1)
                    _add(sums, stats)
                if mini:
                    _add(sums, self._step())
        return sums

    def forward(self, module: Callable[..., PolicyOutput], micro: MicroBatch) -> PolicyOutput:
        """The packed forward as the recipe has it."""
        return module(micro.packed, self.config.objective.image_grad_to_reasoning, self.config.sampling.temperature)

    @torch.no_grad()
    def _old(self, micro: MicroBatch) -> OldPolicy:
        """Recomputed, with the kernels and shapes of the gradient pass. Also where all chains are stale: with ZeRO-3 a
        forward is a collective."""
        return self._old_of(micro, self.forward(self.engine.module, micro))

    def _old_of(self, micro: MicroBatch, output: PolicyOutput) -> OldPolicy:
        """On-policy chains have what the old weights give; stale ones what their behaviour policy recorded."""
        token, image = micro.on_policy[micro.token_owner], micro.on_policy.repeat_interleave(micro.window)
        return OldPolicy(
            torch.where(token, output.logprobs.detach(), micro.behaviour),
            torch.where(image[:, None, None], output.velocity.detach(), micro.v_old),
        )

    @torch.no_grad()
    def references(self, minibatches: list[list[MicroBatch]]) -> list[list[PolicyOutput | None]]:
        """The reference reads the texts itself: its images attend to keys and values of reference weights."""
        if self.reference is None:
            return [[None for _ in mini] for mini in minibatches]
        with self.reference if isinstance(self.reference, HostReference) else nullcontext():
            return [[self.forward(self.reference, micro) for micro in mini] for mini in minibatches]

    def _kept(self, micro: MicroBatch) -> Tensor:
        """1 for the chains [C] of the text objective, 0 for those that are left out of it."""
        left_out = ~micro.finished & self.config.objective.mask_truncated
        return (~left_out).float()

    def _mean_length(self, mini: list[MicroBatch], total: int) -> float:
        """Tokens of the text objective per contributing chain, over all ranks (collective, for token_mean alone)."""
        if self.config.objective.text_aggregation != "token_mean" or not total:
            return 1.0
        tokens = torch.stack([(self._kept(micro) * micro.weight)[micro.token_owner].sum() for micro in mini]).sum()
        torch.distributed.all_reduce(tokens)
        return tokens.item() / total

    def _step(self) -> dict[str, float]:
        norms = self.engine.step()
        if norms is None:
            return {"sum/nonfinite": 1.0}
        return {"count/step": 1.0, **{f"sum/grad_norm/{name}": norm for name, norm in norms.items()}}

    def _loss(
        self, micro: MicroBatch, old: OldPolicy | None, reference: PolicyOutput | None, total: int, mean_length: float
    ) -> tuple[Tensor, dict[str, float], OldPolicy]:
        """The loss of one micro-batch, scaled so that the average over ranks is the mean over all chains; its
        statistics; the old policy, which without one given is this very forward."""
        o = self.config.objective
        output = self.forward(self.engine.engine, micro)
        old = old or self._old_of(micro, output)
        move = self.sampler.step(micro.packed.t, micro.t_next, self.config.sampling.noise_level)

        text = self._text(micro, output, old, mean_length)
        divergence = self._divergence(micro, output, old, move)
        image = self._image(micro, output, old, move, divergence)
        per_chain = o.text_weight * text.loss + o.image_weight * image.loss
        if reference is not None and o.regulariser != "none":
            distance = objective.REGULARISERS[o.regulariser](output.velocity, reference.velocity, move)
            per_chain = per_chain + o.regulariser_weight * distance.view(micro.shape).mean(1)
        if reference is not None and o.text_kl:
            kl = objective.text_kl(output.logprobs, reference.logprobs, micro.token_owner, micro.chains)
            per_chain = per_chain + o.text_kl * kl * self._kept(micro)
        loss = (per_chain * micro.weight).sum() * self.ranks / max(total, 1)
        return loss, self._stats(micro, output, reference, text, image, divergence), old

    def _divergence(
        self, micro: MicroBatch, output: PolicyOutput, old: OldPolicy, move: flow.StepCoefficients
    ) -> Tensor:
        """KL of the window's steps to the old policy's, [C, K]; 0 where no noise makes them one step."""
        if not self.config.sampling.noise_level:
            return torch.zeros(micro.shape, device=output.velocity.device)
        return flow.gaussian_kl(output.velocity.detach(), old.velocity, move).view(micro.shape)

    def _text(self, micro: MicroBatch, output: PolicyOutput, old: OldPolicy, mean_length: float) -> objective.Surrogate:
        o, owner, kept = self.config.objective, micro.token_owner, self._kept(micro)[micro.token_owner]
        log_ratio = objective.TEXT_RATIOS[o.text_ratio](output.logprobs - old.logprobs, owner, micro.chains)
        weight = kept
        if o.text_importance_cap:
            weight = kept * objective.importance_weight(old.logprobs, micro.behaviour, o.text_importance_cap)
        lengths = objective.TEXT_LENGTHS[o.text_aggregation](
            objective.sum_by_chain(kept, owner, micro.chains), mean_length, self.config.sampling.max_tokens
        )
        return objective.text_objective(
            log_ratio, micro.advantage, weight, owner, lengths, o.text_clip_low, o.text_clip_high
        )

    def _image(
        self, micro: MicroBatch, output: PolicyOutput, old: OldPolicy, move: flow.StepCoefficients, divergence: Tensor
    ) -> objective.Surrogate:
        o = self.config.objective
        if not self.config.sampling.noise_level:  # no ratio; zero gradients, so that every rank's hooks are called
            none = torch.zeros(micro.shape, device=output.velocity.device)
            return objective.Surrogate(0 * output.velocity.flatten(1).mean(1).view(micro.shape).mean(1), none, none)
        mean = flow.mean_of(move, micro.packed.x_t, output.velocity)
        mean_old = flow.mean_of(move, micro.packed.x_t, old.velocity)
        if o.ratio_norm:
            log_ratio = flow.ratio_norm_log(micro.x_next, mean_old, mean, move.std)
        else:
            log_ratio = flow.plain_log_ratio(micro.x_next, mean_old, mean, self.sampler.precision(move.std))
        dt = (micro.t_next - micro.packed.t).view(micro.shape)
        weight = objective.guard_weight(dt) if o.image_reweight else torch.ones_like(dt)
        return objective.image_objective(
            log_ratio.view(micro.shape), micro.advantage, divergence, weight, o.image_trust, self.image_bound
        )

    @torch.no_grad()
    def _stats(
        self,
        micro: MicroBatch,
        output: PolicyOutput,
        reference: PolicyOutput | None,
        text: objective.Surrogate,
        image: objective.Surrogate,
        divergence: Tensor,
    ) -> dict[str, float]:
        token = micro.weight[micro.token_owner]
        step = micro.weight[:, None].expand(micro.shape)

        def over_chains(values: Tensor) -> float:
            return (values.view(micro.shape).mean(1) * micro.weight).sum().item()

        drift = (output.velocity - micro.v_old).abs().flatten(1).mean(1)
        mse = objective.velocity_mse(output.velocity, reference.velocity) if reference else torch.zeros_like(drift)
        return {
            "count/chain": micro.weight.sum().item(),
            "count/token": token.sum().item(),
            "count/window": step.sum().item(),
            "sum/text/ratio": (text.ratio * token).sum().item(),
            "sum/text/clipped": (text.clipped * token).sum().item(),
            "sum/text/logprob_diff": ((output.logprobs - micro.behaviour).abs() * token).sum().item(),
            "sum/text/entropy": (output.entropy * token).sum().item(),
            "sum/image/ratio": (image.ratio * step).sum().item(),
            "sum/image/log_ratio_abs": (image.log_ratio.abs() * step).sum().item(),
            "sum/image/clipped": (image.clipped * step).sum().item(),
            "sum/image/kl_old": over_chains(divergence),
            "sum/image/velocity_mse": over_chains(mse),
            "sum/image/velocity_diff": over_chains(drift),
        }


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value


# Metric: the sum behind it, what that is divided by, and the neutral value where nothing contributed.
MEANS = {
    "text/ratio_mean": ("sum/text/ratio", "count/token", 1.0),
    "text/clip_fraction": ("sum/text/clipped", "count/token", 0.0),
    "text/logprob_diff_rollout": ("sum/text/logprob_diff", "count/token", 0.0),
    "text/entropy": ("sum/text/entropy", "count/token", 0.0),
    "image/ratio_mean": ("sum/image/ratio", "count/window", 1.0),
    "image/log_ratio_abs": ("sum/image/log_ratio_abs", "count/window", 0.0),
    "image/clip_fraction": ("sum/image/clipped", "count/window", 0.0),
    "image/kl_old": ("sum/image/kl_old", "count/chain", 0.0),
    "image/velocity_mse": ("sum/image/velocity_mse", "count/chain", 0.0),
    "image/velocity_diff_rollout": ("sum/image/velocity_diff", "count/chain", 0.0),
}


def _norm_means(groups: Iterable[str]) -> dict[str, tuple[str, str, float]]:
    return {f"grad_norm/{name}": (f"sum/grad_norm/{name}", "count/step", 0.0) for name in groups}


def sums_of(groups: Iterable[str]) -> list[str]:
    """Every key of what `Updater.run` returns where these groups of parameters are trained, in one order."""
    means = MEANS | _norm_means(groups)
    return sorted({"sum/nonfinite", *(key for total, count, _ in means.values() for key in (total, count))})


def metrics_of(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all ranks -> the means that are reported; without a contributing chain, the neutral values."""
    groups = {"reasoning", "denoising"} | {key.rpartition("/")[2] for key in sums if key.startswith("sum/grad_norm/")}
    means = {
        metric: sums.get(total, 0.0) / sums[count] if sums.get(count) else empty
        for metric, (total, count, empty) in (MEANS | _norm_means(groups)).items()
    }
    return {**means, "loss/nonfinite": sums.get("sum/nonfinite", 0.0)}
