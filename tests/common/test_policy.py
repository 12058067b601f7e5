"""The packed forward: a chain's numbers are its own, and gradients go where they should."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from golden_numbers import CHECKPOINT, GOLDEN, SQUARES, close, golden, tensor

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.bagel.decoder import Packing
from common.bagel.policy import BagelPolicy, PackedBatch, pack_batch, pixels_to_tokens

# The same sums in another order: fp32 rounding of values around 3.
ROUNDING = 2e-5


@pytest.fixture
def trainable() -> BagelPolicy:
    """A policy whose gradients this test may fill."""
    return store.load(CHECKPOINT).policy


def random_texts(policy: BagelPolicy, lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, policy.config.llm_config.vocab_size, n).tolist() for n in lengths]


def random_images(policy: BagelPolicy, count: int, grid: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, grid[0] * grid[1], policy.config.token_dim, generator=generator)
    return x, torch.rand(count, generator=generator)


def batch_of(
    policy: BagelPolicy, texts: list[list[int]], firsts: list[int], owner: list[int], seed: int = 0
) -> PackedBatch:
    x, t = random_images(policy, len(owner), (2, 3), seed)
    scored = [(first, len(text)) for first, text in zip(firsts, texts, strict=True)]
    return pack_batch(texts, scored, x, t, torch.tensor(owner), (2, 3))


def test_packed_forward_equals_one_chain_at_a_time(golden_checkpoint: Checkpoint) -> None:
    policy = golden_checkpoint.policy
    texts, firsts, owner = random_texts(policy, (5, 23, 1 + 1, 40)), [2, 20, 1, 1], [0, 0, 1, 2, 3, 3, 3]
    batch = batch_of(policy, texts, firsts, owner)
    with torch.no_grad():
        packed = policy(batch)
        alone = [policy.token_logprobs([text])[0][first - 1 :] for text, first in zip(texts, firsts, strict=True)]
        close(packed.logprobs, torch.cat(alone), atol=ROUNDING, rtol=0)
        for image, text in enumerate(owner):
            single = slice(image, image + 1)
            velocity = policy.velocity(batch.x_t[single], batch.t[single], policy.prefill([texts[text]]), batch.grid)
            close(packed.velocity[single], velocity, atol=ROUNDING, rtol=0)


def test_order_of_images_and_owners_is_kept(golden_checkpoint: Checkpoint) -> None:
    policy = golden_checkpoint.policy
    texts = random_texts(policy, (7, 19, 4))
    batch = batch_of(policy, texts, [1, 1, 1], [0, 1, 2, 0])
    turned = pack_batch(
        texts[::-1],
        [(1, len(text)) for text in texts[::-1]],
        batch.x_t.flip(0),
        batch.t.flip(0),
        torch.tensor([2, 0, 1, 2]),
        batch.grid,
    )
    with torch.no_grad():
        one, other = policy(batch), policy(turned)
    close(one.velocity, other.velocity.flip(0), atol=ROUNDING, rtol=0)
    parts = other.logprobs.split([len(text) - 1 for text in texts[::-1]])
    close(one.logprobs, torch.cat(parts[::-1]), atol=ROUNDING, rtol=0)


def test_padding_changes_nothing(golden_checkpoint: Checkpoint) -> None:
    """A longer neighbour pads the others; its own content must not matter at all."""
    policy = golden_checkpoint.policy
    texts, images = random_texts(policy, (6, 9)), [0, 1]
    firsts = [1, 1, 1]
    with torch.no_grad():
        alone = policy(batch_of(policy, texts, firsts[:2], images))
        beside = [
            policy(batch_of(policy, [*texts, *random_texts(policy, (60,), seed)], firsts, images)) for seed in (1, 2)
        ]
    count = len(alone.logprobs)
    for output in beside:
        close(output.logprobs[:count], alone.logprobs, atol=ROUNDING, rtol=0)
        close(output.velocity, alone.velocity, atol=ROUNDING, rtol=0)
    assert torch.equal(beside[0].logprobs[:count], beside[1].logprobs[:count])
    assert torch.equal(beside[0].velocity, beside[1].velocity)


def test_a_token_does_not_see_what_follows(golden_checkpoint: Checkpoint) -> None:
    policy = golden_checkpoint.policy
    (text,) = random_texts(policy, (12,))
    changed = [*text[:8], *((i + 1) % policy.config.llm_config.vocab_size for i in text[8:])]
    with torch.no_grad():
        first, second = policy.token_logprobs([text])[0], policy.token_logprobs([changed])[0]
    close(first[:7], second[:7], atol=1e-6, rtol=0)
    assert (first[7:] - second[7:]).abs().max() > 0.01


def gradients(policy: BagelPolicy, loss: torch.Tensor) -> dict[str, float]:
    policy.zero_grad()
    loss.backward()
    return {n: 0.0 if p.grad is None else p.grad.norm().item() for n, p in policy.named_parameters()}


@pytest.mark.parametrize("image_grad_to_text", [True, False])
def test_image_gradient_reaches_reasoning_parameters_only_if_asked(
    trainable: BagelPolicy, image_grad_to_text: bool
) -> None:
    batch = batch_of(trainable, random_texts(trainable, (9, 14)), [3, 3], [0, 1, 1])
    norms = gradients(trainable, trainable(batch, image_grad_to_text).velocity.square().mean())
    groups = trainable.parameter_groups()
    # The last layer's keys and values are the last of the text that an image sees.
    last = f"layers.{trainable.config.llm_config.num_hidden_layers - 1}.self_attn"
    seen = f"language_model.model.{last}.v_proj.weight"
    assert all(norms[name] > 0 for name, _ in groups["denoising"])
    if image_grad_to_text:
        assert norms[seen] > 0
        assert norms["language_model.model.embed_tokens.weight"] > 0
    else:
        assert {name: norms[name] for name, _ in groups["reasoning"] if norms[name]} == {}
    assert all(p.requires_grad for _, p in groups["reasoning"])


def test_cutting_the_image_gradient_leaves_values_and_denoising_gradients(trainable: BagelPolicy) -> None:
    batch = batch_of(trainable, random_texts(trainable, (9, 14)), [3, 3], [0, 1, 1])
    outputs, kept = [], []
    for flag in (True, False):
        outputs.append(trainable(batch, flag))
        trainable.zero_grad()
        (outputs[-1].velocity.square().mean() - outputs[-1].logprobs.mean()).backward()
        kept.append({name: p.grad.clone() for name, p in trainable.parameter_groups()["denoising"]})
    close(outputs[1].velocity, outputs[0].velocity, atol=ROUNDING, rtol=0)
    close(outputs[1].logprobs, outputs[0].logprobs, atol=ROUNDING, rtol=0)
    for name, gradient in kept[0].items():
        close(kept[1][name], gradient, atol=ROUNDING)


def test_cut_forward_is_the_same_with_and_without_gradients(trainable: BagelPolicy) -> None:
    """Kernels depend on what requires a gradient; the old policy of a ratio is computed without one."""
    batch = batch_of(trainable, random_texts(trainable, (9, 14)), [3, 3], [0, 1, 1])
    for flag in (True, False):
        output = trainable(batch, flag)
        with torch.no_grad():
            again = trainable(batch, flag)
        assert torch.equal(output.velocity, again.velocity)
        assert torch.equal(output.logprobs, again.logprobs)


@pytest.mark.parametrize("image_grad_to_text", [True, False])
def test_recomputing_activations_keeps_less_and_changes_no_gradient(
    trainable: BagelPolicy, image_grad_to_text: bool
) -> None:
    batch = batch_of(trainable, random_texts(trainable, (9, 14)), [3, 3], [0, 1, 1])
    found = []
    for recompute in (False, True):
        if recompute:
            trainable.recompute_activations()
        kept = [0]

        def count(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = trainable(batch, image_grad_to_text)
        (output.velocity.square().mean() - output.logprobs.mean()).backward()
        gradients = {n: p.grad.clone() for n, p in trainable.named_parameters() if p.grad is not None}
        found.append((kept[0], output, gradients))
        trainable.zero_grad(set_to_none=True)
    (plain, one, gradients), (less, other, again) = found
    assert less < plain / 4
    assert torch.equal(one.velocity, other.velocity) and torch.equal(one.logprobs, other.logprobs)
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        close(again[name], gradient, atol=1e-7, rtol=1e-5)


def test_text_gradient_leaves_denoising_parameters_alone(trainable: BagelPolicy) -> None:
    batch = batch_of(trainable, random_texts(trainable, (9, 14)), [3, 3], [0, 1])
    norms = gradients(trainable, trainable(batch).logprobs.mean())
    groups = trainable.parameter_groups()
    assert all(norms[name] == 0 for name, _ in groups["denoising"])
    assert all(norms[name] > 0 for name, _ in groups["reasoning"])


def test_parameter_groups_are_disjoint_and_complete(golden_checkpoint: Checkpoint) -> None:
    policy = golden_checkpoint.policy
    groups = {role: [name for name, _ in pairs] for role, pairs in policy.parameter_groups().items()}
    assert set(groups) == {"reasoning", "denoising"}
    names = groups["reasoning"] + groups["denoising"]
    assert sorted(names) == sorted(name for name, p in policy.named_parameters() if p.requires_grad)
    assert len(set(names)) == len(names)
    assert "latent_pos_embed.pos_embed" not in names, "the position table is frozen"
    outside = ("vae2llm.", "llm2vae.", "time_embedder.")
    assert set(groups["denoising"]) == {name for name in names if "_moe_gen" in name or name.startswith(outside)}
    assert "language_model.lm_head.weight" in groups["reasoning"]


def test_reasoning_weights_are_the_understanding_half(golden_checkpoint: Checkpoint) -> None:
    policy = golden_checkpoint.policy
    weights = dict(policy.reasoning_weights())
    reasoning = {name.removeprefix("language_model."): p for name, p in policy.parameter_groups()["reasoning"]}
    assert weights.keys() == reasoning.keys()
    assert all(torch.equal(weights[name], p) for name, p in reasoning.items())


def recorded_document(policy: BagelPolicy) -> tuple[PackedBatch, torch.Tensor]:
    """The packed document of train_t2i.npz, and eps - x_0 of its image."""
    numbers = golden("bagel/train_t2i.npz")
    text = numbers["token_ids"][numbers["token_type"] == 0].tolist()
    rows = numbers["ce_loss_indexes"].tolist()
    scored = (rows[0] + 1, rows[-1] + 2)
    assert text[slice(*scored)] == numbers["ce_labels"].tolist()
    t = tensor(numbers["token_timestep"][numbers["mse_loss_indexes"][:1]])
    grid = tuple(numbers["latent_shapes"][0].tolist())
    x_t, noise = tensor(numbers["x_t"])[None], tensor(numbers["noise"])[None]
    clean = (x_t - t * noise) / (1 - t)
    return pack_batch([text], [scored], x_t, t, torch.tensor([0]), grid), noise - clean


def test_noised_latents_of_the_recorded_document(golden_checkpoint: Checkpoint) -> None:
    numbers = golden("bagel/train_t2i.npz")
    images = (tensor(numbers["padded_images"]) * 0.5 + 0.5).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    with torch.no_grad():
        clean = pixels_to_tokens(golden_checkpoint.vae, golden_checkpoint.config, images)
    t = numbers["token_timestep"].max()
    close((1 - t) * clean[0] + t * tensor(numbers["noise"]), numbers["x_t"])


def test_recorded_training_forward_and_gradients(trainable: BagelPolicy) -> None:
    """The reference's training forward of one document: CE on the reasoning plus MSE of the velocity."""
    numbers = golden("bagel/train_t2i.npz")
    batch, target = recorded_document(trainable)
    output = trainable(batch)
    close(-output.logprobs, numbers["ce"])
    close(output.velocity[0], numbers["v_pred"])
    close(((output.velocity - target) ** 2)[0], numbers["mse"], atol=SQUARES)
    loss = -output.logprobs.mean() + ((output.velocity - target) ** 2).mean()
    close(loss, numbers["loss"])

    loss.backward()
    parameters = {name: p for name, p in trainable.named_parameters() if p.requires_grad}
    names = json.loads((GOLDEN / "bagel/README.json").read_text())["train_t2i.npz"]["grad_names"]
    assert sorted(parameters) == names
    close([parameters[name].grad.norm().item() for name in names], numbers["grad_norms"])
    stored = [key.removeprefix("grad:") for key in numbers if key.startswith("grad:")]
    assert stored
    for name in stored:
        close(parameters[name].grad, numbers["grad:" + name])


def test_prefill_is_read_with_padding_on_the_right() -> None:
    packing = Packing.of([2, 3], torch.device("cpu"))
    assert packing.index.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert packing.present.tolist() == [[True, True, False], [True, True, True]]
    assert packing.positions.tolist() == [0, 1, 0, 1, 2]
    flat = torch.arange(5)
    assert torch.equal(packing.flatten(packing.pad(flat)), flat)
