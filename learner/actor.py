"""One learner rank: DeepSpeed around the policy, updates, published weights, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError

from common import flow, lora, parameters
from common.actors import building, node_name
from common.advantage import group_advantages
from common.config import TrainConfig
from common.policy import PolicyOutput, directories, open_policy
from common.records import read_groups, write_groups
from common.system_prompts import system_prompt
from common.timeline import Span, take_spans, timed
from common.transport import TransportError
from common.transport.collective import CollectiveSender
from common.types import Chain, Group, WeightManifest
from learner import checkpoint as run_checkpoint
from learner.engine import Engine, init_process_group
from learner.publish import Publisher
from learner.reference import HostReference
from learner.refl import ReFLUpdater
from learner.self_test import CHAINS, Comparison, Seen, compare
from learner.update import MicroBatch, Updater, lay_out, metrics_of, share_out, sums_of


class LearnerRank:
    """Holds one shard of the optimizer. Every public method is called on all ranks together."""

    @building
    def __init__(self, config: TrainConfig, rank: int, address: str, resume: str | None) -> None:
        """address: host:port of rank 0's rendezvous; resume: a checkpoint directory of this run, or None. ConfigError,
        with the name of the node, if policy or checkpoint cannot be read there."""
        self.config, self.rank, self.ranks = config, rank, config.learner.ranks
        init_process_group(rank, self.ranks, address, config.learner.deadline_s)
        torch.manual_seed(config.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = device
        # ZeRO keeps a full copy of the weights on every rank and fills it from the module it is given; with adapters
        # only these. A resumed run starts here too: what it trained comes with the masters. Frozen parts compute as
        # they do in the rollout.
        dtype, frozen = (getattr(torch, room.dtype) for room in (config.learner, config.rollout))
        self.checkpoint = open_policy(config.model, dtype, device, frozen)
        policy, o = self.checkpoint.policy, config.objective
        parameters.choose(policy, config.learner, config.optimizer)
        self.reference: Callable[..., PolicyOutput] | None = None
        if o.uses_reference and config.learner.lora:
            self.reference = lora.reference_of(policy)
        elif o.uses_reference and config.learner.reference_on_host:
            self.reference = HostReference(policy)
        elif o.uses_reference:
            # The checkpoint the run started from. Its parameters keep requires_grad although nothing trains them:
            # torch picks other kernels without it, and the distance of equal weights must be exactly 0.
            reference = open_policy(config.model, dtype, device, frozen=None).policy.eval()
            parameters.freeze(reference, config.optimizer.frozen)
            self.reference = reference
        rows, cols = self.checkpoint.grid(config.model.height, config.model.width)
        bound = flow.image_bound(o, rows * cols * self.checkpoint.token_dim)
        if config.learner.activation_checkpointing:
            policy.recompute_activations()
        groups = parameters.groups(policy, config.optimizer)
        self.rates = {name: rate for name, rate in parameters.rates(config.optimizer).items() if name in groups}
        self.named = [pair for pairs in groups.values() for pair in pairs]
        self.engine = Engine(
            policy,
            {name: ([p for _, p in groups[name]], rate) for name, rate in self.rates.items()},
            zero_stage=config.learner.zero_stage,
            dtype=config.learner.dtype,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            grad_clip=config.optimizer.grad_clip,
        )
        parts = self.engine, self.reference, config, bound, self.ranks
        self.updater = ReFLUpdater(self.checkpoint, *parts) if config.algorithm == "refl" else Updater(*parts)
        self.publisher = Publisher(self.engine, config.rollout.dtype, config.rollout.bucket_mb, rank)
        self.sender: CollectiveSender | None = None
        self.version = 0
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        # Rank 0 writes it into every checkpoint.
        self.reference_identity = run_checkpoint.identity(directories(config.model)) if rank == 0 else ""
        if resume:
            self._resume(Path(resume))

    def _resume(self, directory: Path) -> None:
        # The driver has read every byte a moment ago; of the ranks one does, for its node.
        state = (run_checkpoint.verify if self.rank == 0 else run_checkpoint.read_state)(directory)
        self.engine.load_state(self.named, run_checkpoint.read_optimizer(directory), state["optimizer_steps"])
        self.version = state["weights_version"]

    def spans(self) -> list[Span]:
        """What this rank has done since its last update began."""
        return take_spans()

    def misses(self, path: str) -> str | None:
        """This node's name if a path of the driver does not exist here."""
        return None if Path(path).exists() else node_name()

    def parameters(self) -> str:
        """The table of what is trained at which rate."""
        return parameters.table(self.checkpoint.policy, self.config.optimizer)

    def ping(self) -> int:
        """The version this rank holds."""
        return self.version

    def take(self, refs: list[ray.ObjectRef], rewards: NDArray[np.float64]) -> None:
        """Fetches the groups of a step that this rank has chains of; rewards [B, G] as `group_advantages` takes them.

        Apart from `update`, so that a group that is lost is noticed before any rank waits for another in a collective.
        """
        o = self.config.objective
        self.advantages = group_advantages(rewards, std=o.advantage_std, clip=o.advantage_clip)
        # ReFL learns from a chain alone; a group whose rewards are equal teaches it as much as any.
        mask = np.isfinite(rewards) if self.config.algorithm == "refl" else self.advantages.mask
        self.share = share_out(mask, self.rank, self.ranks, o.minibatches, self.config.learner.chains_per_micro_batch)
        wanted = sorted({b for mini in self.share.pieces for micro in mini for b, _, _ in micro})
        take_spans()  # of the step before, which nobody asked for
        with timed(f"learner-{self.rank}", "fetch"):
            self.groups: dict[int, Group] = dict(zip(wanted, ray.get([refs[b] for b in wanted]), strict=True))

    def take_for_test(self, refs: list[ray.ObjectRef]) -> None:
        """Fetches the group that `self_test` looks at; apart from it as `take` is from `update`."""
        self.tested: Group = ray.get(refs[self.rank % len(refs)])

    @torch.no_grad()
    def self_test(self) -> Comparison | None:
        """A few chains of one of the groups, as the rollout and as this rank sees them; None for those of other
        weights than these, which cannot agree."""
        chains = [(self.tested, chain) for chain in self.tested.chains[:CHAINS]]
        size = self.config.learner.chains_per_micro_batch
        seen = []
        # In micro-batches as the update's, and on every rank, whatever its chains: with ZeRO-3 a forward is a
        # collective.
        for start in range(0, len(chains), size):
            piece = chains[start : start + size]
            micro = self._lay_out(piece, [0.0] * len(piece), [0.0] * len(piece))
            output = self.updater.forward(self.engine.module, micro)
            with torch.enable_grad():
                again = self.updater.forward(self.engine.module, micro)
            again = PolicyOutput(again.logprobs.detach(), again.entropy.detach(), again.velocity.detach())
            reference = self.updater.references([[micro]])[0][0] if self.version == 0 else None
            seen.append(Seen(micro, output, again, reference))
        if not all(s.micro.on_policy.all() for s in seen):
            return None
        return compare(seen, self.config.sampling)

    def update(self, step: int) -> dict[str, float]:
        """One joint update from all groups that the ranks took; metrics of all ranks. Without any contributing chain or
        finite gradient nothing changes."""
        advantages, share = self.advantages, self.share
        self.engine.set_learning_rates(self.config.optimizer.learning_rate_factor(step, self.config.steps), self.rates)
        minibatches = [
            [
                self._lay_out(
                    [(self.groups[b], self.groups[b].chains[g]) for b, g, _ in micro],
                    [float(advantages.values[b, g]) for b, g, _ in micro],
                    [weight for *_, weight in micro],
                )
                for micro in mini
            ]
            for mini in share.pieces
        ]
        started = time.monotonic()
        with timed(f"learner-{self.rank}", "update"):
            sums = self.updater.run(minibatches, share.total)
        compute = time.monotonic() - started
        sums = self._over_ranks(sums)
        self.version += sums["count/step"] > 0
        return {
            **metrics_of(sums),
            "advantage/abs_mean": float(
                np.abs(advantages.values[advantages.mask]).mean() if advantages.mask.any() else 0
            ),
            "reward/zero_variance_groups": float(advantages.zero_variance_groups),
            "reward/masked_chains": float(advantages.unscored_chains),
            "weights/version": float(self.version),
            "checkpoint/failed": float(
                self.writing is not None and self.writing.done() and bool(self.writing.exception())
            ),
            "time/update_math_s": compute,
        }

    def _lay_out(self, chains: list[tuple[Group, Chain]], advantages: list[float], weights: list[float]) -> MicroBatch:
        cfg, guidance = self.config.sampling.cfg, None
        if cfg.enabled:
            texts = [group.prompt.text for group, _ in chains]
            guidance = self.checkpoint.guidance(texts, system_prompt(self.config.model.system_prompt), cfg)
        return lay_out(
            [chain for _, chain in chains],
            advantages,
            weights,
            self.checkpoint,
            self.version,
            self.device,
            [group.prompt for group, _ in chains],
            guidance,
        )

    def _over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        """Adds up chains over ranks; what every rank has alike (steps, norms) counts once."""
        alike = ("count/step", "sum/grad_norm", "sum/nonfinite")
        keys = sums_of(self.rates)
        values = torch.tensor([sums.get(key, 0.0) for key in keys], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        return {k: v / self.ranks if k.startswith(alike) else v for k, v in zip(keys, values.tolist(), strict=True)}

    def publish(self) -> Iterator[NDArray[np.uint8] | WeightManifest]:
        """Yields, on rank 0, the bytes of each bucket that changed since the call before, in the rollout's compute
        type; last, the manifest of the current version."""
        with timed(f"learner-{self.rank}", "publish"):
            for flat in self.publisher.changes(self.version):
                yield flat.cpu().numpy()
        assert self.publisher.manifest is not None
        yield self.publisher.manifest

    def manifest(self) -> tuple[WeightManifest, str]:
        """The current version for `send`, and the address where its receivers meet rank 0 (there only)."""
        for _ in self.publisher.changes(self.version):
            pass
        assert self.publisher.manifest is not None
        if self.rank == 0 and self.sender is None:
            self.sender = CollectiveSender(torch.device(self.device), self.config.rollout.deadline_s)
        return self.publisher.manifest, self.sender.address if self.sender else ""

    def send(self, name: str, replicas: int, version: int) -> None:
        """Broadcasts what the replicas of a round lack of a version; a round of a past version is refused.
        TransportError on rank 0 if it failed; the ranks stay in step."""
        manifest = self.publisher.manifest
        assert manifest is not None
        needed = torch.zeros(len(manifest.buckets), dtype=torch.int64, device=self.device)
        failure = None
        if self.sender:
            try:
                if version != self.version or version != manifest.version:
                    self.sender.refuse(name, f"version {version} is past")
                    raise TransportError(f"weights version {version} is past")
                needed[self.sender.meet(name, replicas, manifest)] = 1
            except TransportError as error:
                failure = error
        torch.distributed.broadcast(needed, 0)
        with timed(f"learner-{self.rank}", "publish"):
            for flat in self.publisher.bytes_of(needed.nonzero()[:, 0].tolist()):
                if self.sender and failure is None:
                    try:
                        self.sender.send(flat)
                    except TransportError as error:  # the other ranks go on gathering
                        failure = error
        if failure:
            raise failure

    def record(
        self, path: str, refs: list[ray.ObjectRef], rewards: NDArray[np.float64], by_scorer: dict[str, NDArray]
    ) -> None:
        """Writes the groups of the last update as Parquet, with the advantages that it used; called on rank 0 alone."""
        advantages = self.advantages.values
        write_groups(Path(path), ray.get(refs), rewards, by_scorer, advantages, self.config.recording.latents)

    def save(self, directory: str, state: dict[str, Any], in_flight: dict[int, list[ray.ObjectRef]]) -> str | None:
        """Copies what a run checkpoint holds (collective), which rank 0 then writes in the background; state is the
        driver's part of state.json, in_flight finished groups of steps to come. Waits for the checkpoint before; what
        went wrong with that, None if nothing."""
        problem = self.saved()
        optimizer = self.engine.state(self.named, keep=self.rank == 0)
        weights = self.engine.rest(keep=self.rank == 0)
        if self.rank == 0:
            own = {
                "weights_version": self.version,
                "optimizer_steps": self.engine.steps,
                "reference": self.reference_identity,
            }
            self.writing = self.writer.submit(
                run_checkpoint.write,
                Path(directory),
                self.checkpoint,
                weights,
                optimizer,
                {**state, **own},
                self.config.checkpoints.keep,
                {step: groups for step, refs in in_flight.items() if (groups := _those_left(refs))},
            )
        return problem

    def restore(self, path: str) -> tuple[Any, ...]:
        """None, then the groups of a file of groups in flight, in order."""
        return None, *(group for group, *_ in read_groups(Path(path)))

    def written(self, wait_s: float) -> bool:
        """Whether no checkpoint is being written any more, after a wait of at most so long."""
        return self.writing is None or bool(wait([self.writing], wait_s).done)

    def saved(self) -> str | None:
        """Waits until the checkpoint that is being written is whole; what went wrong with it, None if nothing."""
        error = self.writing.exception() if self.writing else None
        self.writing = None
        return f"{type(error).__name__}: {error}" if error else None


def _those_left(refs: list[ray.ObjectRef]) -> list[Group]:
    """Groups whose node is still there; the others are generated again in any case."""
    groups = []
    for ref in refs:
        with suppress(ObjectLostError):
            groups.append(ray.get(ref))
    return groups
