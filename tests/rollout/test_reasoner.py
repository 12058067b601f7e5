"""The reasoner against golden log-probabilities of the reference BAGEL code, on a real vLLM engine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_numbers import GOLDEN, golden
from safetensors.torch import load_file

from rollout.reasoner import Completion, Reasoner, _in_parts
from rollout.reasoner_dir import reasoner_shapes, understanding_weights, write_reasoner_dir

EOS = json.loads((GOLDEN / "README.json").read_text())["special_token_ids"]["eos_token_id"]
VOCABULARY = json.loads((GOLDEN / "ckpt/llm_config.json").read_text())["vocab_size"]
# Longer than a KV block of any platform, so that later requests can be served from the prefix cache.
LONG = 150
# Most tokens of a request: a long one with its completion, or a recorded text.
LIMIT = 2 * LONG + len(golden("bagel/text.npz")["c_ids"])
# Of log-probabilities in float32, at most 5e-6 off where measured.
TOLERANCE = 1e-5

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["untied", "tied"])
def llm_config(request: pytest.FixtureRequest) -> dict[str, Any]:
    config = json.loads((GOLDEN / "ckpt/llm_config.json").read_text())
    return config | {"tie_word_embeddings": request.param == "tied"}


@pytest.fixture(scope="module")
def weights(llm_config: dict[str, Any]) -> Weights:
    found = dict(understanding_weights(load_file(GOLDEN / "ckpt/ema.safetensors").items()))
    if llm_config["tie_word_embeddings"]:
        # As a head, the checkpoint's embedding would give nearly certain tokens.
        head = found.pop("lm_head.weight")
        found["model.embed_tokens.weight"] *= head.std() / found["model.embed_tokens.weight"].std()
    return found


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, llm_config: dict[str, Any], weights: Weights
) -> Iterator[Reasoner]:
    directory = tmp_path_factory.mktemp("reasoner") / "model"
    write_reasoner_dir(directory, llm_config, weights.items())
    reasoner = Reasoner(directory, eos_token_id=EOS, max_model_len=LIMIT, max_batch=96)
    yield reasoner
    reasoner.close()


@pytest.fixture
def reasoner(engine: Reasoner, weights: Weights) -> Reasoner:
    """The engine with the weights of the checkpoint, whatever the test before it did."""
    engine.load_weights(weights.items())
    return engine


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]


def reference_logprobs(llm_config: dict[str, Any], weights: Weights, ids: list[int]) -> np.ndarray:
    """Log-probabilities of every token after each prefix of `ids`, [len(ids), vocabulary].

    transformers' Qwen3 is the same decoder once the bias it has on `o_proj` is zero. In float64 but for its norms.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    head_dim = llm_config["hidden_size"] // llm_config["num_attention_heads"]
    shared = {key: value for key, value in llm_config.items() if key not in ("architectures", "model_type", "qk_norm")}
    config = Qwen3Config(**shared, head_dim=head_dim, attention_bias=True)
    model = Qwen3ForCausalLM(config).double().eval()
    unset = model.load_state_dict(weights, strict=False).missing_keys
    assert all(name.endswith("o_proj.bias") or name == "lm_head.weight" for name in unset)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


def reference_scores(llm_config: dict[str, Any], weights: Weights, ids: list[int]) -> np.ndarray:
    return reference_logprobs(llm_config, weights, ids)[np.arange(len(ids) - 1), ids[1:]]


def rescoring_error(reasoner: Reasoner, prompts: list[list[int]], completions: list[Completion]) -> float:
    """Largest difference between recorded and teacher-forced log-probabilities."""
    errors = []
    for prompt, completion in zip(prompts, completions, strict=True):
        scores = reasoner.probe(prompt + completion.ids)[len(prompt) - 1 :]
        errors.append(np.abs(np.array(scores) - np.array(completion.logprobs)).max())
    return float(max(errors))


def test_starts_with_the_weights_of_its_directory(
    engine: Reasoner, llm_config: dict[str, Any], weights: Weights
) -> None:
    text = golden("bagel/text.npz")
    ids, logprobs = text["c_ids"].tolist(), text["c_logprobs"]
    expected = reference_scores(llm_config, weights, ids)
    if not llm_config["tie_word_embeddings"]:
        np.testing.assert_allclose(expected, logprobs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(engine.probe(ids), expected, rtol=0, atol=TOLERANCE)


def test_sampling_is_a_function_of_the_seed(reasoner: Reasoner) -> None:
    (prompt,) = random_prompts(1, 20)
    first = reasoner.generate([prompt] * 4, [7, 8, 7, 9], max_tokens=24)
    again = reasoner.generate([prompt] * 4, [7, 8, 7, 9], max_tokens=24)
    assert first == again
    assert first[0].ids == first[2].ids
    assert len({tuple(completion.ids) for completion in first}) == 3


def test_seed_does_not_depend_on_the_batch(reasoner: Reasoner) -> None:
    prompts = random_prompts(8, 20)
    together = reasoner.generate(prompts, list(range(8)), max_tokens=16)
    alone = [reasoner.generate([prompt], [seed], max_tokens=16)[0] for seed, prompt in enumerate(prompts)]
    assert [completion.ids for completion in together] == [completion.ids for completion in alone]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_and_logprobs_are_those_of_the_softmax(
    reasoner: Reasoner, temperature: float, llm_config: dict[str, Any], weights: Weights
) -> None:
    (prompt,) = random_prompts(1, 12)
    count = 4000
    drawn = reasoner.generate([prompt] * count, list(range(count)), max_tokens=1, temperature=temperature)
    expected = np.exp(reference_logprobs(llm_config, weights, prompt)[-1] / temperature)
    expected /= expected.sum()
    ids = [completion.ids[0] for completion in drawn]
    logprobs = [completion.logprobs[0] for completion in drawn]
    np.testing.assert_allclose(logprobs, np.log(expected[ids]), rtol=0, atol=TOLERANCE / temperature)
    counts = np.bincount(ids, minlength=len(expected))
    frequent = expected * count > 5
    cells = np.append(expected[frequent], expected[~frequent].sum()) * count
    seen = np.append(counts[frequent], counts[~frequent].sum())
    chi2, freedom = ((seen - cells) ** 2 / cells).sum(), len(cells) - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_recorded_logprobs_equal_teacher_forcing(reasoner: Reasoner) -> None:
    prompts = random_prompts(16, 40)
    completions = reasoner.generate(prompts, list(range(16)), max_tokens=40)
    assert rescoring_error(reasoner, prompts, completions) < TOLERANCE


def test_eos_is_recorded_and_ends_a_completion(reasoner: Reasoner, weights: Weights) -> None:
    # Far more EOS than from the checkpoint, but not always.
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    head = weights[name].clone()
    head[EOS] *= 3
    reasoner.load_weights((weights | {name: head}).items())
    prompts = random_prompts(64, 10)
    completions = reasoner.generate(prompts, list(range(64)), max_tokens=12)
    assert 0 < sum(completion.finished for completion in completions) < 64
    for completion in completions:
        assert len(completion.logprobs) == len(completion.ids)
        assert EOS not in completion.ids[:-1]
        assert completion.finished == (completion.ids[-1] == EOS)
        assert completion.finished or len(completion.ids) == 12
    assert rescoring_error(reasoner, prompts, completions) < TOLERANCE


@pytest.mark.parametrize("in_process", [True, False], ids=["direct", "through a file"])
def test_load_weights_changes_the_output_and_can_be_undone(
    reasoner: Reasoner,
    weights: Weights,
    llm_config: dict[str, Any],
    in_process: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reasoner, "_in_process", in_process)
    (ids,) = random_prompts(1, 60)
    before = reasoner.probe(ids)
    other = {name: tensor * 1.2 for name, tensor in weights.items()}
    other["model.embed_tokens.weight"] = other["model.embed_tokens.weight"].flip(0)
    reasoner.load_weights(other.items())
    loaded = reasoner.probe(ids)
    assert np.abs(np.array(loaded) - before).max() > 0.1
    np.testing.assert_allclose(loaded, reference_scores(llm_config, other, ids), rtol=0, atol=2 * TOLERANCE)
    reasoner.load_weights(weights.items())
    assert reasoner.probe(ids) == before


def test_every_weight_is_replaced(reasoner: Reasoner, weights: Weights) -> None:
    (ids,) = random_prompts(1, 30)
    before = reasoner.probe(ids)
    for name in weights:
        # Not a constant factor: the same added to every score of a softmax, or a factor before a norm, does nothing.
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
        changed = weights[name] + 0.3 * (weights[name].std() + 0.1) * noise
        reasoner.load_weights((weights | {name: changed}).items())
        assert reasoner.probe(ids) != before, name


def test_no_keys_and_values_survive_a_load(reasoner: Reasoner, weights: Weights) -> None:
    prompts = random_prompts(2, LONG) * 2
    seeds = [1, 2, 3, 4]
    old = reasoner.generate(prompts, seeds, max_tokens=8)
    assert rescoring_error(reasoner, prompts, old) < TOLERANCE
    reasoner.load_weights((name, tensor * 1.2) for name, tensor in weights.items())
    new = reasoner.generate(prompts, seeds, max_tokens=8)
    assert new != old
    assert rescoring_error(reasoner, prompts, new) < TOLERANCE


def test_reasoning_goes_on_with_other_weights_after_a_pause(reasoner: Reasoner, weights: Weights) -> None:
    """Every token's log-prob is that of the weights that drew it, in the context of all tokens before it."""
    prompts, seeds, limit = random_prompts(4, 40), [1, 2, 3, 4], 24
    whole = reasoner.generate(prompts, seeds, max_tokens=limit)
    tokens = count()
    begun = reasoner.generate(prompts, seeds, max_tokens=limit, paused=lambda: next(tokens) == 8)
    cuts = [len(completion.ids) for completion in begun]
    assert all(0 < cut < limit for cut in cuts) and not any(completion.finished for completion in begun)
    assert [c.ids for c in begun] == [c.ids[:cut] for c, cut in zip(whole, cuts, strict=True)]

    reasoner.load_weights((name, tensor * 1.2) for name, tensor in weights.items())
    done = reasoner.generate(prompts, seeds, max_tokens=limit, begun=begun, paused=lambda: False)
    for prompt, before, after, cut in zip(prompts, begun, done, cuts, strict=True):
        assert (after.ids[:cut], after.logprobs[:cut]) == (before.ids, before.logprobs)
        assert after.finished or len(after.ids) == limit
        errors = np.abs(np.array(reasoner.probe(prompt + after.ids))[len(prompt) - 1 :] - after.logprobs)
        assert errors[cut:].max() < TOLERANCE < 1e-2 < errors[:cut].max()
    assert reasoner.generate(prompts, seeds, max_tokens=limit, begun=done) == done, "nothing is left to do"
    # Two chains of one prompt that were paused alike do not go on alike.
    twins = reasoner.generate(prompts[:1] * 2, [5, 6], max_tokens=limit, begun=begun[:1] * 2)
    assert twins[0].ids != twins[1].ids


def test_a_wrong_set_of_weights_is_refused(reasoner: Reasoner, weights: Weights) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"
    without = {key: value for key, value in weights.items() if key != name}
    wrong = {
        "not given": without.items(),
        "no weight": [*weights.items(), ("model.layers.1.self_attn.o_proj.bias", torch.zeros(128))],
        "twice": [*weights.items(), (name, weights[name])],
        "shape": [*without.items(), (name, torch.zeros(3))],
    }
    for message, given in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            reasoner.load_weights(given)
        with pytest.raises(RuntimeError, match="mixture"):
            reasoner.generate([[1, 2]], [0], max_tokens=1)
    reasoner.load_weights(weights.items())
    reasoner.generate([[1, 2]], [0], max_tokens=1)


def test_weights_that_vllm_did_not_take_are_noticed(
    reasoner: Reasoner, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    load = Qwen2ForCausalLM.load_weights
    other = {name: tensor * 1.1 for name, tensor in weights.items()}
    for lost in ("self_attn.v_proj.weight", "mlp.up_proj.weight", "embed_tokens.weight", "layernorm.weight"):
        monkeypatch.setattr(
            Qwen2ForCausalLM,
            "load_weights",
            lambda self, given, lost=lost: load(self, [w for w in given if lost not in w[0]]),
        )
        with pytest.raises(RuntimeError, match=f"vLLM does not hold .*{lost}"):
            reasoner.load_weights(other.items())
        monkeypatch.undo()
        reasoner.load_weights(weights.items())


def test_arguments_that_cannot_be_served_are_refused(reasoner: Reasoner) -> None:
    refused: list[tuple[list[list[int]], list[int]]] = [
        ([[]], [0]),
        ([[VOCABULARY]], [0]),
        ([[1] * LIMIT], [0]),
        ([[1]], [-1]),
    ]
    for prompts, seeds in [*refused, ([[1]], [])]:
        with pytest.raises(ValueError):
            reasoner.generate(prompts, seeds, max_tokens=1)


def test_a_second_reasoner_in_the_process_is_refused(
    engine: Reasoner, llm_config: dict[str, Any], weights: Weights, tmp_path: Path
) -> None:
    write_reasoner_dir(tmp_path / "model", llm_config, weights.items())
    with pytest.raises(RuntimeError, match="close"):
        Reasoner(tmp_path / "model", eos_token_id=EOS, max_model_len=64, max_batch=8)


def test_an_incomplete_directory_is_not_written(llm_config: dict[str, Any], weights: Weights, tmp_path: Path) -> None:
    assert reasoner_shapes(llm_config) == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with pytest.raises(RuntimeError, match="not given"):
        write_reasoner_dir(tmp_path / "model", llm_config, list(weights.items())[1:])
    assert list(tmp_path.iterdir()) == []


def test_weights_go_to_other_processes_in_parts() -> None:
    given = [(str(n), torch.zeros(n, dtype=torch.uint8)) for n in (3, 4, 9, 1, 1)]
    assert [[name for name, _ in part] for part in _in_parts(iter(given), 8)] == [["3", "4"], ["9"], ["1", "1"]]
