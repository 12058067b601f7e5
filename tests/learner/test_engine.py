"""DeepSpeed around the policy: state goes out and in again exactly; fp32 masters hear a bf16 policy's small steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from chains import changed, make_engine, snapshot
from golden_numbers import CHECKPOINT, close
from listening import listening

from common.bagel import checkpoint as store
from common.bagel.policy import BagelPolicy, PackedBatch, pack_batch
from common.weights import pack, unpack
from learner.engine import Engine
from learner.publish import Publisher

pytestmark = pytest.mark.usefixtures("one_rank")

ROLES = ("reasoning", "denoising")


def fresh() -> BagelPolicy:
    return store.load(CHECKPOINT).policy


def batch_of(policy: BagelPolicy, seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    size = policy.config.llm_config.vocab_size
    texts = [torch.randint(0, size, (n,), generator=generator).tolist() for n in (7, 12)]
    x = torch.randn(3, 4, policy.config.token_dim, generator=generator)
    t = torch.rand(3, generator=generator)
    return pack_batch(texts, [(2, 7), (3, 12)], x, t, torch.tensor([0, 1, 1]), (2, 2))


def loss_of(engine: Engine, seed: int) -> torch.Tensor:
    output = engine.engine(batch_of(engine.module, seed))
    return -output.logprobs.mean() + output.velocity.square().mean()


def train(engine: Engine, seeds: range) -> None:
    for seed in seeds:
        engine.backward(loss_of(engine, seed), last=True)
        assert engine.step() is not None


def named(policy: BagelPolicy) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for pairs in policy.parameter_groups().values() for pair in pairs]


def test_ranks_meet_on_the_address_they_were_given_alone() -> None:
    store = torch.distributed.distributed_c10d._get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    assert listening(store.port) == {"127.0.0.1"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("stage", "other_stage"), [(1, 1), (2, 2), (2, 1), (3, 3), (3, 2), (2, 3)])
def test_state_goes_out_and_in_again_exactly(
    monkeypatch: pytest.MonkeyPatch, dtype: str, stage: int, other_stage: int
) -> None:
    """Masters, moments and step counts; the next steps equal those of the run that was not interrupted."""
    monkeypatch.setattr("learner.engine.PERSISTENT", 0)
    policy = fresh()
    engine = make_engine(policy, lr=1e-3, zero_stage=stage, dtype=dtype)
    train(engine, range(3))
    saved, steps = engine.state(named(policy)), engine.steps
    assert steps == 3
    assert saved.keys() == {f"{key}.{n}" for n, _ in named(policy) for key in ("master", "exp_avg", "exp_avg_sq")}
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert all(saved[f"exp_avg_sq.{name}"].abs().max() > 0 for name, _ in named(policy))

    # The interrupted run starts from other weights than the saved ones.
    resumed = fresh()
    other = make_engine(resumed, lr=1e-3, zero_stage=other_stage, dtype=dtype)
    other.load_state(named(resumed), saved, steps)
    again = other.state(named(resumed))
    assert other.steps == steps
    assert again.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(again[name], tensor), name

    if (stage == 3) != (other_stage == 3):
        return  # ZeRO-3 adds up the next gradients in another order, which shows in their last bits
    train(engine, range(3, 5))
    train(other, range(3, 5))
    straight, after = engine.state(named(policy)), other.state(named(resumed))
    for name, tensor in straight.items():
        assert torch.equal(after[name], tensor), name
    with engine.gathered(list(policy.parameters())), other.gathered(list(resumed.parameters())):
        assert changed(resumed, snapshot(policy)) == set(), "the compute weights follow the masters"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_masters_reach_the_compute_weights_at_once(dtype: str) -> None:
    """A resumed run publishes, and rolls out, before its first update."""
    policy = fresh()
    engine = make_engine(policy, lr=1e-3, dtype=dtype)
    train(engine, range(2))
    resumed = fresh()
    other = make_engine(resumed, lr=1e-3, dtype=dtype)
    other.load_state(named(resumed), engine.state(named(policy)), engine.steps)
    assert changed(resumed, snapshot(policy)) == set()


def test_state_before_the_first_step(golden_checkpoint: store.Checkpoint) -> None:
    policy = fresh()
    engine = make_engine(policy, lr=1e-3)
    state = engine.state(named(policy))
    assert engine.steps == 0
    for name, parameter in named(golden_checkpoint.policy):
        assert torch.equal(state[f"master.{name}"], parameter)
        assert not state[f"exp_avg.{name}"].any()
    resumed = fresh()
    other = make_engine(resumed, lr=1e-3)
    other.load_state(named(resumed), state, 0)
    train(engine, range(2))
    train(other, range(2))
    assert changed(resumed, snapshot(policy)) == set()


def test_a_step_is_adamw() -> None:
    """Against torch's AdamW on a plain copy, with a learning rate per group and accumulation over micro-batches."""
    policy, plain = fresh(), fresh()
    rates = dict(zip(ROLES, (1e-3, 3e-4), strict=True))
    groups = {name: ([p for _, p in pairs], rates[name]) for name, pairs in policy.parameter_groups().items()}
    engine = Engine(policy, groups, zero_stage=2, dtype="float32", betas=(0.8, 0.9), weight_decay=0.01, grad_clip=0.0)
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in pairs], "lr": rates[n]} for n, pairs in plain.parameter_groups().items()],
        betas=(0.8, 0.9),
        weight_decay=0.01,
    )
    for step in range(2):
        optimizer.zero_grad()
        for part in range(3):
            engine.backward(loss_of(engine, 3 * step + part), last=part == 2)
            output = plain(batch_of(plain, 3 * step + part))
            (-output.logprobs.mean() + output.velocity.square().mean()).backward()
        norms = engine.step()
        for name, pairs in plain.parameter_groups().items():
            wanted = math.sqrt(sum(p.grad.double().square().sum().item() for _, p in pairs))
            close(norms[name], wanted, rtol=1e-4)
        optimizer.step()
    for (_, found), (_, wanted) in zip(named(policy), named(plain), strict=True):
        close(found, wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_micro_batches_add_up_in_fp32_under_bf16_compute(stage: int) -> None:
    """The same one 12 times is 12 times its gradient, which a sum in bf16 misses."""
    norms = []
    for times in (1, 12):
        engine = make_engine(fresh(), lr=1e-3, zero_stage=stage, dtype="bfloat16")
        for part in range(times):
            engine.backward(loss_of(engine, 0), last=part == times - 1)
        norms.append(engine.step())
    for role in ROLES:
        close(norms[1][role] / norms[0][role], 12.0, rtol=1e-5)


def test_gradients_are_clipped_by_the_norm_over_both_groups() -> None:
    """Without moments of earlier steps Adam's second step tells a scaled gradient: its moments are linear in it."""
    moments = []
    for clip in (0.0, 0.5):
        policy = fresh()
        groups = {name: ([p for _, p in pairs], 1e-3) for name, pairs in policy.parameter_groups().items()}
        engine = Engine(
            policy, groups, zero_stage=2, dtype="float32", betas=(0.9, 0.999), weight_decay=0.0, grad_clip=clip
        )
        engine.backward(loss_of(engine, 0), last=True)
        norms = engine.step()
        moments.append(engine.state(named(policy)))
    total = math.hypot(*norms.values())
    assert total > 0.5, "the reported norms are those before clipping"
    for name, _ in named(policy):
        close(moments[1][f"exp_avg.{name}"], moments[0][f"exp_avg.{name}"] * (0.5 / total), atol=1e-7, rtol=1e-3)


def test_bf16_compute_hears_steps_that_bf16_would_round_away() -> None:
    """A learning rate of 1e-6: every fp32 master moves by about that, though its bf16 copy mostly cannot."""
    policy = fresh()
    engine = make_engine(policy, lr=1e-6, dtype="bfloat16")
    assert policy.vae2llm.weight.dtype == torch.bfloat16
    before = engine.state(named(policy))
    compute = snapshot(policy)
    train(engine, range(1))
    after = engine.state(named(policy))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    moved = (after[f"master.{name}"] - before[f"master.{name}"]).abs()
    assert 0.9e-6 < moved.median().item() < 1.1e-6
    assert moved.max().item() < 2e-6
    stuck = (dict(policy.named_parameters())[name] == compute[name]).float().mean().item()
    assert stuck > 0.9, "bf16 weights alone would have lost the step"
    # Steps of 1e-5 in one direction, each below the resolution of most weights, add up to what bf16 can hold.
    engine.set_learning_rates(10.0, dict.fromkeys(ROLES, 1e-6))
    for _ in range(15):
        engine.backward(loss_of(engine, 0), last=True)
        engine.step()
    stuck = (dict(policy.named_parameters())[name] == compute[name]).float().mean().item()
    assert stuck < 0.7
    for key, parameter in named(policy):
        assert torch.equal(parameter, engine.state([(key, parameter)])[f"master.{key}"].bfloat16())


def test_learning_rates_are_scaled_from_their_base() -> None:
    engine = make_engine(fresh(), lr=1e-3)
    base = dict(zip(ROLES, (4e-4, 2e-4), strict=True))
    for factor in (0.5, 0.25, 1.0):
        engine.set_learning_rates(factor, base)
        assert [g["lr"] for g in engine.optimizer.param_groups] == [base[role] * factor for role in ROLES]
    policy = engine.module
    engine.set_learning_rates(0.0, base)
    before = snapshot(policy)
    train(engine, range(1))
    assert changed(policy, before) == set()


def test_a_dropped_gradient_leaves_nothing_behind() -> None:
    policy, untouched = fresh(), fresh()
    engine, other = make_engine(policy, lr=1e-3), make_engine(untouched, lr=1e-3)
    train(engine, range(1))
    train(other, range(1))
    before = engine.state(named(policy))
    engine.backward(loss_of(engine, 7) * math.nan, last=True)
    assert engine.step() is None
    assert engine.steps == 1
    for name, tensor in engine.state(named(policy)).items():
        assert torch.equal(tensor, before[name]), name
    engine.backward(loss_of(engine, 8), last=True)
    engine.drop()
    train(engine, range(1, 3))
    train(other, range(1, 3))
    assert changed(untouched, snapshot(policy)) == set()


def test_only_what_changed_is_published_again() -> None:
    """First everything, frozen tensors included; then the buckets whose compute weights differ, and nothing else."""
    policy = fresh()
    for name, parameter in policy.named_parameters():
        # As with adapters: a base that stays, and few tensors that are trained.
        parameter.requires_grad_("layers.1" in name)
    engine = make_engine(policy, lr=1e-3)
    publisher = Publisher(engine, "float32", bucket_mb=64, rank=0)
    sent = sum(len(flat) for flat in publisher.changes(1))
    first = publisher.manifest
    assert first is not None and sent >= 4 * sum(p.numel() for p in policy.parameters())
    assert [n for b in first.buckets for n in b.names if "layers.1" not in n], "the frozen base travels once"

    assert list(publisher.changes(2)) == [] and publisher.manifest is not None
    assert (publisher.manifest.version, publisher.manifest.checksum) == (2, first.checksum)

    before = snapshot(policy)
    train(engine, range(1))
    sent = sum(len(flat) for flat in publisher.changes(3))
    assert publisher.manifest.changed_since(first) == [0], "trained tensors lie together"
    assert set(publisher.manifest.differences(first)) == changed(policy, before) != set()
    assert sent < 4.1 * sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_sharded_weights_are_published_a_bucket_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 gathers one bucket, and every parameter is a shard again before the next."""
    monkeypatch.setattr("learner.engine.PERSISTENT", 0)
    policy, plain = fresh(), fresh()
    engine = make_engine(policy, zero_stage=3)
    publisher = Publisher(engine, "float32", bucket_mb=1, rank=0)
    bucket = max(1 << 20, *(p.numel() * p.itemsize for p in plain.parameters()))
    whole = []

    def watched(*arguments: Any) -> Any:
        whole.append(sum(p.numel() * p.itemsize for p in policy.parameters()))
        return pack(*arguments)

    monkeypatch.setattr("learner.publish.pack", watched)
    flats = [flat.clone() for flat in publisher.changes(1)]
    assert publisher.manifest is not None and len(flats) > 1
    held = dict(
        pair for bucket, flat in zip(publisher.manifest.buckets, flats, strict=True)
        for pair in unpack(bucket, flat, torch.float32)
    )  # fmt: skip
    assert held.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(held[name], parameter) for name, parameter in plain.named_parameters())
    assert 0 < max(whole) <= bucket
    assert not any(p.numel() for p in policy.parameters())
