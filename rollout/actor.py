"""A rollout replica: reasoning by vLLM, then the image, for whole groups of chains."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from common.actors import building
from common.config import TrainConfig
from common.lora import add_adapters
from common.policy import Guidance, open_policy
from common.system_prompts import system_prompt
from common.transport import receiver
from common.types import Chain, Group, ImageSegment, RolloutRequest, RolloutStats, TextSegment, WeightManifest
from common.weights import held_bucket, unpack
from rollout.denoiser import Denoiser
from rollout.reasoner import Completion, Reasoner, start_reasoner
from rollout.reasoner_actor import RemoteReasoner

PROBE_LENGTH = 16
# fp32 kernels of two engines differ in the last bits; a weight that is not the published one differs far more.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


class ForgottenWeightsError(RuntimeError):
    """The process is not the one that loaded what it is to generate with."""


@dataclass(frozen=True)
class Begun:
    """Reasoning that was paused for new weights: of each chain what there is and the oldest weights that made it; the
    seconds it took, and when it began."""

    completions: list[Completion]
    versions: list[int]
    seconds: float
    started: float


class RolloutReplica:
    """Holds the policy twice over where it must: the understanding half in vLLM, all of it in the denoiser.

    Everything is built here, so that an actor that Ray restarts is complete except for the current weights, which the
    pool sends before it gives out work.
    """

    @building
    def __init__(self, config: TrainConfig) -> None:
        """ConfigError, with the name of the node, if the policy cannot be read there."""
        self.config = config
        self.dtype = config.rollout.dtype
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, self.dtype)
        self.checkpoint = open_policy(config.model, dtype, device, frozen=dtype)
        if config.learner.lora:
            add_adapters(self.checkpoint.policy, config.learner.lora)
        self.checkpoint.policy.eval()
        self.checkpoint.policy.keep_for_drawing()
        sampling = config.sampling
        self.denoiser = Denoiser(
            self.checkpoint,
            config.model.height,
            config.model.width,
            sampling.shift,
            sampling.noise_level,
            sampling.sampler,
        )
        self.system = system_prompt(config.model.system_prompt)
        self.reasoner = self._start_reasoner() if sampling.think else None
        self.start = uuid.uuid4().hex
        self.version = -1  # before the first load
        self.held: WeightManifest | None = None
        self.mixed = False
        self.waiting: int | None = None  # the version that reasoning is to pause for
        self.receiver = receiver(config, torch.device(device))

    def _start_reasoner(self) -> Reasoner | RemoteReasoner:
        """vLLM in this process or, if the recipe says so, in an actor of its own, with the weights of the denoiser."""
        sampling, rollout = self.config.sampling, self.config.rollout
        described, weights = self.checkpoint.reasoner, dict(self.checkpoint.policy.reasoning_weights())
        options = {
            "shapes": {name: tuple(tensor.shape) for name, tensor in weights.items()},
            "eos_token_id": self.checkpoint.chat.ends,
            "dtype": self.dtype,
            "max_model_len": sampling.max_prompt_tokens + sampling.max_tokens,
            "max_batch": self.config.reasoner_batch,
            "memory_bytes": rollout.kv_cache_mb << 20,
            "tensor_parallel": rollout.tensor_parallel,
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
        }
        elsewhere = rollout.reasoner_actor is not None
        pauses = bool(self.config.max_staleness)
        reasoner: Reasoner | RemoteReasoner = (
            RemoteReasoner(rollout, described, options, pauses) if elsewhere else start_reasoner(described, **options)
        )
        reasoner.load_weights(weights.items())
        return reasoner

    def ping(self) -> str:
        """Answers when the replica is built: which start of the actor this is."""
        return self.start

    def close(self) -> None:
        """Stops vLLM where it runs in this process, which may then start another."""
        if isinstance(self.reasoner, Reasoner):
            self.reasoner.close()

    def pause(self, version: int) -> None:
        """A version waits to be loaded: the reasoning of the call under way stops where it is. Called beside it."""
        self.waiting = version

    def checksum(self, manifest: WeightManifest) -> str:
        """The checksum of the weights that this replica holds, computed anew from its tensors."""
        return self._holding(manifest).checksum

    def _holding(self, manifest: WeightManifest) -> WeightManifest:
        weights = self.checkpoint.policy.state_dict()
        return replace(manifest, buckets=tuple(held_bucket(bucket, weights) for bucket in manifest.buckets))

    def load_weights(self, manifest: WeightManifest, ticket: Any) -> str:
        """Replaces both copies of the weights, bucket by bucket where they changed, and proves it: the checksum of what
        the denoiser now holds.

        RuntimeError if a tensor is not the published one, in the denoiser or in vLLM, or if vLLM, asked for log-probs
        of a fixed sequence, does not answer as the denoiser's copy does. The replica then holds a mixture and
        generates nothing until a load succeeds.
        """
        policy, dtype = self.checkpoint.policy, getattr(torch, manifest.dtype)
        weights = policy.state_dict()
        # Of what it was built from, or of a load that failed, it keeps what is as published.
        before = self.held or self._holding(manifest)
        self.held, self.mixed = None, True
        for index, flat in self.receiver.receive(manifest, before, ticket):
            for name, tensor in unpack(manifest.buckets[index], flat, dtype):
                weights[name].copy_(tensor)
        if self.reasoner is not None:
            self.reasoner.load_weights(policy.reasoning_weights())
        held = self._holding(manifest)
        if wrong := manifest.differences(held):
            raise RuntimeError(
                f"weights version {manifest.version}: the denoiser does not hold {wrong[0]} as it was published"
            )
        if self.reasoner is not None:
            self._probe(self.reasoner, manifest.version)
        self.held, self.version, self.mixed, self.waiting = held, manifest.version, False, None
        return held.checksum

    @torch.no_grad()
    def _probe(self, reasoner: Reasoner | RemoteReasoner, version: int) -> None:
        ids = np.random.default_rng(0).integers(0, self.checkpoint.policy.vocab_size, PROBE_LENGTH).tolist()
        expected = self.checkpoint.policy.token_logprobs([ids])[0]
        difference = float((torch.tensor(reasoner.probe(ids)) - expected.cpu()).abs().max())
        if not difference <= PROBE_TOLERANCE[self.dtype]:
            raise RuntimeError(
                f"weights version {version}: vLLM's log-probs differ by {difference:.2g} from the published weights'; "
                "the load did not take effect"
            )

    def generate(
        self, requests: list[RolloutRequest], begun: Begun | None = None, holding: int | None = None
    ) -> tuple[RolloutStats | Group | Begun | None, ...]:
        """Statistics, then one Group per request, in order. If the reasoning was paused, None, what is begun, and None
        for every further request: a call that is given it, of this replica or another, goes on from there.

        holding: the version that the caller knows of, -1 for what was built; ForgottenWeightsError if it is another.
        Ray rebuilds an idle actor unheard, and serves its next call as if nothing had been.
        """
        if holding not in (None, self.version):
            raise ForgottenWeightsError(f"weights version {holding} is wanted, but {self.version} is held")
        if self.mixed:
            raise RuntimeError("the last load of weights failed, so this replica may hold a mixture")
        chat, version = self.checkpoint.chat, self.version
        think = self.config.sampling.think
        prompts = [chat.prompt_ids(request.prompt.text, self.system, think) for request in requests]
        flat = [(prompts[i], seed, request) for i, request in enumerate(requests) for seed in request.seeds]
        begun = begun or Begun([Completion([], [], False) for _ in flat], [version] * len(flat), 0.0, time.time())
        started = time.monotonic() - begun.seconds
        completions = self._reason([ids for ids, _, _ in flat], [seed for _, seed, _ in flat], begun.completions)
        versions = [v if c.ids else version for v, c in zip(begun.versions, begun.completions, strict=True)]
        if not all(map(self._ended, completions)):
            paused = Begun(completions, versions, time.monotonic() - started, begun.started)
            return None, paused, *[None] * (len(requests) - 1)
        reasoned = time.monotonic()
        images = self.denoiser.draw(
            [chat.context_ids(ids, c.ids) for (ids, _, _), c in zip(flat, completions, strict=True)],
            [seed for _, seed, _ in flat],
            [request.window for _, _, request in flat],
            requests[0].points,
            self._guidance([request for _, _, request in flat]),
            [request.start for _, _, request in flat],
            version,
        )
        chains = [
            self._chain(ids, completion, image, seed, oldest)
            for (ids, seed, _), completion, image, oldest in zip(flat, completions, images, versions, strict=True)
        ]
        groups, start = [], 0
        for request in requests:
            end = start + len(request.seeds)
            groups.append(Group(request.prompt, request.step, tuple(chains[start:end])))
            start = end
        tokens = sum(len(completion.ids) for completion in completions)
        cut = sum(not completion.finished for completion in completions)
        seconds = reasoned - started, time.monotonic() - reasoned
        return RolloutStats(min(versions), len(chains), tokens, cut, *seconds, begun.started), *groups

    def _guidance(self, requests: list[RolloutRequest]) -> Guidance | None:
        cfg = requests[0].cfg
        if cfg is None or not cfg.enabled:
            return None
        return self.checkpoint.guidance([request.prompt.text for request in requests], self.system, cfg)

    def _reason(self, prompts: list[list[int]], seeds: list[int], begun: list[Completion]) -> list[Completion]:
        if self.reasoner is None:
            return [Completion([], [], True) for _ in prompts]
        sampling = self.config.sampling
        return self.reasoner.generate(
            prompts,
            seeds,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            begun=begun,
            paused=self._paused if self.config.max_staleness else None,
        )

    def _paused(self) -> bool:
        return self.waiting not in (None, self.version)

    def _ended(self, completion: Completion) -> bool:
        return completion.finished or len(completion.ids) >= self.config.sampling.max_tokens

    def _chain(self, prompt: list[int], completion: Completion, image: ImageSegment, seed: int, version: int) -> Chain:
        text = TextSegment(
            np.array(prompt, np.int64),
            np.array(completion.ids, np.int64),
            np.array(completion.logprobs, np.float32),
            completion.finished,
            self.checkpoint.chat.decode(completion.ids),
            version,
        )
        return Chain((text, image), seed)
