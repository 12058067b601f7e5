"""Text reasoning with vLLM: token ids in, token ids and log-probabilities out, weights replaced between batches.

The understanding half of the policy is a Qwen2 decoder with q/k/v biases and per-head QK norm. vLLM's own
`Qwen2ForCausalLM` is exactly that when its configuration says `qk_norm`, so nothing is registered here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from common.config import ConfigError
from common.scratch import scratch
from common.types import derived_seed
from rollout.reasoner_dir import (
    checked_weights,
    read_config,
    reasoner_config,
    reasoner_shapes,
    save_weights,
)
from rollout.reasoner_worker import prepare_cpu

PART_BYTES = 512 << 20
"""Of weights that are on their way to vLLM's processes, beside the model."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    ids: sampled token ids, the EOS token included if it was drawn; logprobs: of each id, natural, under the
    distribution it was drawn from; finished: True if generation ended with EOS, False if it was cut at `max_tokens` or
    paused before.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


def _in_parts(weights: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """In order, in runs of `limit` bytes at most; a larger weight has one of its own."""
    run: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if run and size + tensor.nbytes > limit:
            yield run
            run, size = [], 0
        run.append((name, tensor))
        size += tensor.nbytes
    if run:
        yield run


class Reasoner:
    """A vLLM engine for the reasoning policy.

    On a CPU build of torch the engine runs inside the calling process, which should have set `OMP_NUM_THREADS` before
    importing torch. There vLLM takes the process's default `torch.distributed` group and reseeds its global random
    generators, and only one reasoner can be open at a time.
    """

    # Strong, as an engine collected at some later time would tear down the state of the one that followed it.
    _open_here: ClassVar[Reasoner | None] = None

    def __init__(
        self,
        directory: str | Path,
        *,
        eos_token_id: int | Sequence[int],
        dtype: str = "float32",
        max_model_len: int,
        max_batch: int,
        memory_bytes: int = 64 << 20,
        tensor_parallel: int = 1,
        gpu_memory_utilization: float = 0.4,
        shapes: dict[str, tuple[int, ...]] | None = None,
        empty: bool = False,
    ) -> None:
        """directory: what `write_reasoner_dir` wrote, or any causal language model in transformers' layout;
        eos_token_id: what ends a completion, any of several; dtype: of weights, activations and KV cache;
        max_model_len: most tokens of a prompt and its completion together; max_batch: most requests decoded at the same
        time, more are queued; memory_bytes: of the KV cache, on CPU; tensor_parallel: GPUs the model is split over;
        gpu_memory_utilization: share of GPU memory for weights, activations and KV cache; shapes: the weights that
        `load_weights` takes, by default those of `reasoner_shapes`; empty: only the directory's `config.json` is read,
        and `load_weights` has to come before any request.

        ValueError if tensor_parallel is more than 1 on CPU; ConfigError if vLLM needs a GPU and there is none;
        RuntimeError if another reasoner is open in this process and the engine would run here too.
        """
        on_cpu = torch.version.cuda is None and torch.version.hip is None
        if on_cpu and tensor_parallel != 1:
            raise ValueError("tensor_parallel needs GPUs")
        if not (on_cpu or torch.cuda.is_available()):
            raise ConfigError(
                "vLLM is built for GPUs here and this process has none: give rollout.gpus (or that of "
                "rollout.reasoner_actor), or install vLLM for CPUs as README.md says"
            )
        config = read_config(directory)
        self._shapes = shapes or reasoner_shapes(config)
        self._vocab_size = int(config["vocab_size"])
        self._dtype = getattr(torch, dtype)
        self._ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self._max_model_len = max_model_len
        self._usable = not empty

        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Its warnings are many and none is about this use, among them a traceback as no tokenizer has a chat template.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
        set_num_threads = torch.set_num_threads
        if on_cpu:
            prepare_cpu(config["architectures"])
            # Blocks of 32 tokens decode short sequences about a third faster than the default of 128.
            options = {"kv_cache_memory_bytes": memory_bytes, "enforce_eager": True, "block_size": 32}
        import vllm
        from vllm import envs

        self._in_process = not envs.VLLM_ENABLE_V1_MULTIPROCESSING and tensor_parallel == 1
        if self._in_process and Reasoner._open_here is not None:
            raise RuntimeError("vLLM keeps global state; close the reasoner that is open in this process first")
        try:
            self._llm = vllm.LLM(
                model=str(directory),
                skip_tokenizer_init=True,
                load_format="dummy" if empty else "safetensors",
                generation_config="vllm",
                dtype=dtype,  # type: ignore[arg-type]
                max_model_len=max_model_len,
                max_num_seqs=max_batch,
                tensor_parallel_size=tensor_parallel,
                # In a placement group vLLM would look for a bundle of Ray's for each of its workers.
                distributed_executor_backend="mp" if tensor_parallel > 1 else None,
                # After the temperature: the distribution actually sampled from.
                logprobs_mode="processed_logprobs",
                worker_extension_cls="rollout.weight_engine.WorkerExtension",
                weight_transfer_config={"backend": "hand_over"},
                seed=0,
                use_tqdm_on_load=False,
                **options,
            )
        finally:
            # vLLM's CPU worker replaces it for the whole process by a function that does nothing.
            torch.set_num_threads = set_num_threads
        if self._in_process:
            Reasoner._open_here = self

    def close(self) -> None:
        """Stops the engine and frees its memory. The reasoner cannot be used afterwards."""
        self._usable = False
        self._llm.llm_engine.engine_core.shutdown()
        if Reasoner._open_here is self:
            Reasoner._open_here = None

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        begun: list[Completion] | None = None,
        paused: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """Samples one completion for each prompt from the full softmax.

        The same weights, arguments and batch limit give the same completions, unless they are paused.

        prompts: token ids; seeds: of each prompt's own random stream, at least 0; max_tokens: most tokens of a
        completion, EOS included; temperature: divides the logits, and 0 takes the most likely token and records its
        log-probability at 1; begun: what an earlier call made of each prompt before it was paused, of which those not
        ended go on with the weights that are held now; paused: asked after every token, and once it says so what has
        not ended is returned as far as it is. Completions come in the order of the prompts, what was begun included.

        ValueError if the arguments do not fit each other, the vocabulary or max_model_len; RuntimeError if the last
        `load_weights` failed or the reasoner is closed.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        if min(seeds, default=0) < 0:
            raise ValueError("seeds must be at least 0")
        if temperature != 0 and temperature < 0.01:
            raise ValueError("vLLM cannot sample at temperatures below 0.01")
        done = list(begun or [Completion([], [], False)] * len(prompts))
        rest = [i for i, c in enumerate(done) if not c.finished and len(c.ids) < max_tokens]
        outputs = self._run(
            [prompts[i] + done[i].ids for i in rest],
            [_seed_after(seeds[i], len(done[i].ids)) for i in rest],
            [max_tokens - len(done[i].ids) for i in rest],
            paused=paused,
            temperature=temperature,
            logprobs=0,
            stop_token_ids=self._ends,
        )
        for i, output in outputs.items():
            made = output.outputs[0]
            ids, logprobs = list(made.token_ids), list(made.logprobs.logprobs)
            if len(logprobs) != len(ids):
                raise RuntimeError(f"vLLM returned {len(logprobs)} log-probabilities for {len(ids)} tokens")
            before = done[rest[i]]
            ended = bool(ids) and ids[-1] in self._ends
            done[rest[i]] = Completion(before.ids + ids, before.logprobs + logprobs, ended)
        return done

    def probe(self, ids: list[int]) -> list[float]:
        """Natural log-probabilities [n - 1] of every token after the first at temperature 1, of 2 token ids or more and
        fewer than max_model_len; comparing them tells whether the weights here are those expected.

        ValueError if the ids are too few, too many or outside the vocabulary; RuntimeError if the last `load_weights`
        failed or the reasoner is closed.
        """
        if len(ids) < 2:
            raise ValueError("scoring needs at least two token ids")
        outputs = self._run([ids], [0], [1], temperature=1.0, prompt_logprobs=0)
        return list(outputs[0].prompt_logprobs.logprobs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights in place and drops every cached key and value computed with the old ones.

        The weights are read one at a time, on any device, and converted to the engine's dtype. The engine's workers,
        where they are other processes, read them from files in shared memory (`/dev/shm`), of PART_BYTES or one tensor.

        weights: exactly the names of `shapes`, each once. RuntimeError if a weight of the model was not given, one
        given is not the model's, or the engine does not hold them afterwards. It may then hold a mixture and refuses to
        generate until a load succeeds.
        """
        self.begin_load()
        whole = checked_weights(weights, self._shapes)
        for part in [whole] if self._in_process else _in_parts(whole, PART_BYTES):
            self.load_part(part)
        self.end_load()

    def begin_load(self) -> None:
        """From here to `end_load` the weights are a mixture, and nothing is generated."""
        self._usable = False

    def load_part(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces some weights. RuntimeError as for `load_weights`."""
        given = ((name, value.to(self._dtype)) for name, value in weights)
        if self._in_process:
            self._hand_over(list(given))
            return
        memory = Path("/dev/shm")
        with scratch(memory if memory.is_dir() else None) as directory:
            file = str(directory / "weights.safetensors")
            save_weights(given, file)
            self._hand_over(file)

    def end_load(self) -> None:
        """All weights are replaced."""
        self._reset_prefix_cache()
        self._usable = True

    def _hand_over(self, weights: list[tuple[str, torch.Tensor]] | str) -> None:
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"weights": weights}})
        self._llm.finish_weight_update()

    def _run(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        limits: list[int],
        paused: Callable[[], bool] | None = None,
        **params: Any,
    ) -> dict[int, Any]:
        """One request for each prompt, of so many tokens at most; `params` are further vLLM sampling parameters. The
        output of each, by its number; of those that were paused as far as they came."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        if not self._usable:
            raise RuntimeError("the reasoner has no weights yet or a mixture, as the last load failed, or it is closed")
        for ids, limit in zip(prompts, limits, strict=True):
            if not ids or min(ids) < 0 or max(ids) >= self._vocab_size:
                raise ValueError(f"a prompt needs token ids, all from 0 to {self._vocab_size - 1}")
            if len(ids) + limit > self._max_model_len:
                raise ValueError(f"{len(ids)} + {limit} tokens exceed max_model_len {self._max_model_len}")
        # A request served from keys and values of an earlier call differs in the last bits from one that is not.
        self._reset_prefix_cache()
        kind = RequestOutputKind.CUMULATIVE if paused else RequestOutputKind.FINAL_ONLY
        common = {"detokenize": False, "flat_logprobs": True, "ignore_eos": True, "skip_clone": True} | params
        engine, latest = self._llm.llm_engine, dict[int, Any]()
        for number, (ids, seed, limit) in enumerate(zip(prompts, seeds, limits, strict=True)):
            sampling = SamplingParams(max_tokens=limit, seed=seed, output_kind=kind, **common)
            engine.add_request(str(number), TokensPrompt(prompt_token_ids=ids), sampling)
        try:
            while engine.has_unfinished_requests():
                latest.update((int(output.request_id), output) for output in engine.step())
                if paused and paused():
                    break
        finally:
            engine.abort_request([str(number) for number in range(len(prompts))])
        return latest

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")


def start_reasoner(described: dict[str, Any] | Path, **options: Any) -> Reasoner:
    """An engine whose weights `load_weights` will give. described: a directory in transformers' layout, or the
    decoder's `llm_config`; options: further arguments of `Reasoner`."""
    with scratch() as directory:
        if isinstance(described, dict):
            (directory / "config.json").write_text(json.dumps(reasoner_config(described)))
            described = directory
        return Reasoner(described, empty=True, **options)


def _seed_after(seed: int, tokens: int) -> int:
    """Another stream for what follows a pause: the first tokens have used up the beginning of their own."""
    return derived_seed(seed, tokens) if tokens else seed
