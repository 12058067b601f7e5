"""The model against numbers of the reference implementation: text, velocities, autoencoder."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_numbers import ATOL, GOLDEN, close, golden, tensor

from common.bagel import vae
from common.bagel.checkpoint import Checkpoint
from common.bagel.decoder import Layer, Packing
from common.bagel.policy import BagelPolicy, places, sincos_2d
from common.system_prompts import THINK_SYSTEM_PROMPT

SIZES = ("s0", "s1")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def policy(golden_checkpoint: Checkpoint) -> BagelPolicy:
    return golden_checkpoint.policy


def logits(policy: BagelPolicy, texts: list[list[int]], shift: int = 0) -> list[torch.Tensor]:
    packing = Packing.of([len(text) for text in texts], policy.device)
    packing = replace(packing, positions=packing.positions + shift)
    hidden, _ = policy.read(torch.tensor([i for text in texts for i in text]), packing)
    return list(policy.language_model.lm_head(hidden).split([len(text) for text in texts]))


def think_context() -> list[int]:
    numbers = golden("bagel/velocity.npz")
    return [i for part in ("system", "prompt", "think") for i in numbers[f"ctx_{part}_ids"].tolist()]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_text_logits(policy: BagelPolicy, name: str) -> None:
    text = golden("bagel/text.npz")
    close(logits(policy, [text[f"{name}_ids"].tolist()])[0], text[f"{name}_logits"])


def test_text_logits_of_a_packed_batch(policy: BagelPolicy) -> None:
    text = golden("bagel/text.npz")
    names = ["b", "c", "a"]
    for name, found in zip(names, logits(policy, [text[f"{n}_ids"].tolist() for n in names]), strict=True):
        close(found, text[f"{name}_logits"])


def test_rope_is_relative(policy: BagelPolicy) -> None:
    text = golden("bagel/text.npz")
    close(logits(policy, [text["a_ids"].tolist()], shift=7)[0], text["a_shift7_logits"])


def test_logits_of_a_decoded_continuation(policy: BagelPolicy) -> None:
    text = golden("bagel/text.npz")
    context, generated = text["greedy_context_ids"].tolist(), text["greedy_generated"].tolist()
    found = logits(policy, [context + generated])[0][len(context) :]
    close(found, text["greedy_logits"])
    safe = text["greedy_margin"][:-1] > 10 * ATOL
    assert safe.any()
    assert found.argmax(-1)[:-1][safe].tolist() == np.array(generated[1:])[safe].tolist()


def test_token_logprobs(policy: BagelPolicy) -> None:
    text = golden("bagel/text.npz")
    sequences = [text[f"{name}_ids"].tolist() for name in ("a", "c", "b")]
    found = policy.token_logprobs(sequences)
    assert [len(part) for part in found] == [len(ids) - 1 for ids in sequences]
    close(found[1].double(), text["c_logprobs"], atol=2e-5)


def test_tempered_log_probs_and_entropy(policy: BagelPolicy) -> None:
    text = golden("bagel/text.npz")
    ids = text["a_ids"].tolist()
    hidden, _ = policy.read(torch.tensor(ids), Packing.of([len(ids)], policy.device))
    for temperature in (1.0, 0.5):
        found, entropy = policy.score(hidden[:-1], torch.tensor(ids[1:]), temperature)
        wanted = F.log_softmax(tensor(text["a_logits"][:-1]).double() / temperature, -1)
        close(found.double(), wanted[torch.arange(len(ids) - 1), ids[1:]], atol=2e-4)
        close(entropy.double(), -(wanted.exp() * wanted).sum(-1), atol=2e-4)


def test_chat_format(golden_checkpoint: Checkpoint) -> None:
    texts = json.loads((GOLDEN / "README.json").read_text())["texts"]
    numbers, chat = golden("bagel/velocity.npz"), golden_checkpoint.chat
    assert texts["system"] == THINK_SYSTEM_PROMPT
    prompt = chat.prompt_ids(texts["prompt"], THINK_SYSTEM_PROMPT)
    assert prompt == [*numbers["ctx_system_ids"].tolist(), *numbers["ctx_prompt_ids"].tolist(), chat.start]
    assert chat.prompt_ids(texts["prompt"]) == [*numbers["ctx_prompt_ids"].tolist(), chat.start]
    sampled = [*chat.encode(texts["think"]), chat.end]
    assert chat.context_ids(prompt, sampled) == think_context()
    assert chat.context_ids(prompt, sampled[:-1]) == think_context(), "a reasoning cut short is closed"
    assert chat.decode(sampled) == texts["think"]


def test_key_and_value_caches(policy: BagelPolicy) -> None:
    numbers = golden("bagel/velocity.npz")
    context = policy.prefill([think_context()])
    close(torch.cat(context.keys), numbers["ctx_key_cache"])
    close(torch.cat(context.values), numbers["ctx_value_cache"])
    assert context.position.tolist() == [numbers["ctx_position_ids"][-1] + 1]


def test_caches_of_a_padded_batch(policy: BagelPolicy) -> None:
    numbers = golden("bagel/velocity.npz")
    short, long = numbers["batch2_ctx1_ids"].tolist(), think_context()
    context = policy.prefill([short, long])
    assert context.present.sum(1).tolist() == [len(short), len(long)]
    assert context.position.tolist() == [len(short), len(long)]
    close(torch.stack([k[1] for k in context.keys]), numbers["ctx_key_cache"])
    close(torch.stack([v[1] for v in context.values]), numbers["ctx_value_cache"])


@pytest.mark.parametrize("size", SIZES)
def test_velocity_at_all_times(policy: BagelPolicy, golden_checkpoint: Checkpoint, size: str) -> None:
    numbers = golden("bagel/velocity.npz")
    grid = golden_checkpoint.config.grid(*numbers[f"{size}_image_hw"].tolist())
    assert grid == tuple(numbers[f"{size}_grid_hw"])
    times = tensor(numbers["ts"])
    x = torch.stack([tensor(numbers[f"{size}_t{i}_x"]) for i in range(len(times))])
    wanted = np.stack([numbers[f"{size}_t{i}_v"] for i in range(len(times))])
    context = policy.prefill([think_context()])
    one_by_one = [policy.velocity(x[i : i + 1], times[i : i + 1], context, grid)[0] for i in range(len(times))]
    close(torch.stack(one_by_one), wanted)
    close(policy.velocity(x, times, context.take(torch.zeros(len(times), dtype=torch.long)), grid), wanted)


def test_velocity_of_two_contexts_of_different_lengths(policy: BagelPolicy) -> None:
    numbers = golden("bagel/velocity.npz")
    context = policy.prefill([think_context(), numbers["batch2_ctx1_ids"].tolist()])
    x = torch.stack([tensor(numbers["s1_t2_x"]), tensor(numbers["batch2_x1"])])
    found = policy.velocity(x, tensor(numbers["ts"][[2, 2]]), context, tuple(numbers["s1_grid_hw"].tolist()))
    close(found[0], numbers["s1_t2_v"])
    close(found[1], numbers["batch2_v1"])


def test_velocity_under_four_contexts_in_one_batch(policy: BagelPolicy) -> None:
    """With and without reasoning, with and without a system prompt: prefixes of the same conversation."""
    numbers = golden("bagel/velocity.npz")
    system, prompt = numbers["ctx_system_ids"].tolist(), numbers["ctx_prompt_ids"].tolist()
    wanted = ("nothink_v", "cfg_v_cond", "cfg_v_text", "cfg_v_img")
    context = policy.prefill([prompt, think_context(), system, system + prompt])
    x = tensor(numbers["cfg_x"]).expand(4, -1, -1)
    t = tensor(numbers["ts"][[1]]).expand(4)
    found = policy.velocity(x, t, context, tuple(numbers["s0_grid_hw"].tolist()))
    for row, name in enumerate(wanted):
        close(found[row], numbers[name])


def test_time_embedding(policy: BagelPolicy) -> None:
    numbers = golden("bagel/velocity.npz")
    close(policy.time_embedder(tensor(numbers["time_t"])), numbers["time_embed"])


def test_position_table(policy: BagelPolicy, golden_checkpoint: Checkpoint) -> None:
    config = golden_checkpoint.config
    table = sincos_2d(config.max_latent_size, config.llm_config.hidden_size)
    close(table, policy.latent_pos_embed.pos_embed, atol=1e-6, rtol=0)


def test_autoencoder_encodes(golden_checkpoint: Checkpoint) -> None:
    numbers, config = golden("bagel/vae.npz"), golden_checkpoint.config
    pixels = vae.from_uint8(tensor(numbers["image_uint8"])[None])
    close(pixels[0], numbers["image"], atol=1e-6, rtol=0)
    posterior = golden_checkpoint.vae.encode(pixels).latent_dist
    close(posterior.mean, numbers["moments_mean"])
    close(posterior.logvar, numbers["moments_logvar"])
    close(vae.encode(golden_checkpoint.vae, config, pixels)[0], numbers["latent_tokens"])


def test_autoencoder_decodes(golden_checkpoint: Checkpoint) -> None:
    numbers, config = golden("bagel/vae.npz"), golden_checkpoint.config
    grid = config.grid(*numbers["image_uint8"].shape[:2])
    close(vae.decode(golden_checkpoint.vae, config, tensor(numbers["latent_tokens"])[None], grid), numbers["decoded"])
    random = vae.pack(tensor(numbers["z_random"]), config.latent_patch_size)
    close(vae.decode(golden_checkpoint.vae, config, random, grid), numbers["decoded_random"])


def test_packing_order(golden_checkpoint: Checkpoint) -> None:
    numbers, config = golden("bagel/vae.npz"), golden_checkpoint.config
    shape = numbers["latent"].shape
    index = torch.arange(int(np.prod(shape))).view(shape)
    tokens = vae.pack(index, config.latent_patch_size)
    assert (tokens[0].numpy() == numbers["pack_index"]).all()
    grid = config.grid(*numbers["image_uint8"].shape[:2])
    assert torch.equal(vae.unpack(tokens, grid, config.latent_patch_size), index)


@pytest.mark.parametrize(("file", "pixels", "image"), [("ode", "off_pixels", "off_uint8"), ("e2e", "pixels", "uint8")])
def test_pixels_are_truncated(file: str, pixels: str, image: str) -> None:
    numbers = golden(f"bagel/{file}.npz")
    assert (vae.to_uint8(tensor(numbers[pixels]))[0].numpy() == numbers[image]).all()


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_text_advances_rope_by_one(name: str) -> None:
    text = golden("bagel/text.npz")
    positions = Packing.of([len(text[f"{name}_ids"])], torch.device("cpu")).positions
    assert positions.tolist() == text[f"{name}_position_ids"].tolist()


def test_decoding_starts_behind_the_context_and_strings_drift(golden_checkpoint: Checkpoint) -> None:
    """The reference decodes and encodes its reasoning again; the ids that come back are not those that were sampled."""
    text, chat = golden("bagel/text.npz"), golden_checkpoint.chat
    context, generated = text["greedy_context_ids"].tolist(), text["greedy_generated"].tolist()
    assert generated[0] == chat.start
    packing = Packing.of([len(context) + 1], torch.device("cpu"))
    assert packing.positions[-1:].tolist() == text["greedy_start_position"].tolist()
    said = chat.tokenizer.decode(generated[1:], skip_special_tokens=False)
    assert chat.wrap(said) == text["greedy_reencoded"].tolist()
    assert chat.context_ids([*context, chat.start], generated[1:])[len(context) :] == [*generated, chat.end]


@pytest.mark.parametrize("size", SIZES)
def test_a_noised_image_lies_as_the_references(policy: BagelPolicy, golden_checkpoint: Checkpoint, size: str) -> None:
    """Markers around the latents, all at one rope position, behind the cached context."""
    recorded = golden("bagel/velocity.npz")

    def numbers(name: str) -> list[Any]:
        return recorded[f"{size}_{name}"].tolist()

    context, grid = policy.prefill([think_context()]), tuple(numbers("grid_hw"))
    n, cached = grid[0] * grid[1], context.present.sum().item()
    assert golden_checkpoint.config.grid(*numbers("image_hw")) == grid
    assert numbers("packed_text_ids") == list(policy.markers)
    assert numbers("packed_text_indexes") == [0, n + 1]
    assert numbers("packed_vae_token_indexes") == list(range(1, n + 1))
    at = places(grid, golden_checkpoint.config.max_latent_size, policy.device)
    assert at.tolist() == numbers("packed_vae_position_ids")
    assert set(numbers("packed_position_ids")) == set(context.position.tolist())
    assert numbers("packed_seqlens") == [n + 2]
    assert numbers("key_values_lens") == [cached]
    assert numbers("packed_key_value_indexes") == list(range(cached))
    assert numbers("packed_indexes") == list(range(cached, cached + n + 2))


def test_hidden_states_of_a_noised_image(policy: BagelPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's output, latents and markers, in the reference's order."""
    numbers, states = golden("bagel/velocity.npz"), []
    draw = Layer.draw

    def recording(layer: Layer, gen: torch.Tensor, und: torch.Tensor, *rest: torch.Tensor):
        states.append((gen, und))
        states.append(draw(layer, gen, und, *rest))
        return states[-1]

    monkeypatch.setattr(Layer, "draw", recording)
    context, grid = policy.prefill([think_context()]), tuple(numbers["s0_grid_hw"].tolist())
    policy.velocity(tensor(numbers["s0_t1_x"])[None], tensor(numbers["ts"][[1]]), context, grid)
    rows = [torch.cat([und[0, :1], gen[0], und[0, 1:]]) for gen, und in [states[0], *states[1::2]]]
    close(torch.stack(rows), numbers["s0_t1_hidden"])


def test_scaled_latents_and_a_sample_of_the_posterior(golden_checkpoint: Checkpoint) -> None:
    numbers, sizes = golden("bagel/vae.npz"), golden_checkpoint.config.vae_config
    assert [sizes.scale_factor, sizes.shift_factor] == numbers["scale_shift"].tolist()
    mean, deviation = tensor(numbers["moments_mean"]), (0.5 * tensor(numbers["moments_logvar"])).exp()
    tokens = vae.encode(golden_checkpoint.vae, golden_checkpoint.config, tensor(numbers["image"])[None])
    grid = golden_checkpoint.config.grid(*numbers["image"].shape[1:])
    close(vae.unpack(tokens, grid, golden_checkpoint.config.latent_patch_size), numbers["latent"])
    sampled = mean + deviation * tensor(numbers["sample_noise"])
    close(sizes.scale_factor * (sampled - sizes.shift_factor), numbers["latent_sampled"])
