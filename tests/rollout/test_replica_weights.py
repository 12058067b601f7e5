"""One replica in this process: which versions it takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import torch
from published import publish

from common.lora import add_adapters, plain_weights
from common.policy import open_policy
from common.recipe import load_config
from common.types import Prompt, RolloutRequest, WeightManifest
from rollout.actor import RolloutReplica

Version = tuple[WeightManifest, list[ray.ObjectRef]]
REQUEST = RolloutRequest(Prompt("p", "a red circle", {}), 0, (1, 2), None, 3)


@pytest.fixture(scope="module")
def replica(local_ray: None) -> Iterator[RolloutReplica]:
    replica = RolloutReplica(
        load_config("shapes", ["sampling.max_tokens=4", "rollout.dtype=float32", "max_staleness=1"])
    )
    yield replica
    replica.reasoner.close()


@pytest.fixture(scope="module")
def versions(local_ray: None) -> tuple[Version, Version]:
    """The shipped weights, and others of which one tensor differs; in many buckets."""
    policy = open_policy(load_config("shapes").model, torch.float32, "cpu").policy
    weights = {name: p.detach() for name, p in policy.named_parameters()}
    first = publish(weights, 1, limit=1 << 16)
    name = "language_model.model.layers.0.self_attn.k_proj.bias"
    return first, publish(weights | {name: weights[name] + 0.5}, 2, limit=1 << 16)


def test_chains_name_the_version_they_were_made_with(
    replica: RolloutReplica, versions: tuple[Version, Version]
) -> None:
    manifest, buffers = versions[0]
    assert replica.load_weights(manifest, buffers) == manifest.checksum == replica.checksum(manifest)
    stats, group = replica.generate([REQUEST])
    assert stats.chains == 2 and [chain.text.version for chain in group.chains] == [1, 1]


def test_what_a_replica_holds_is_not_fetched_again(replica: RolloutReplica, versions: tuple[Version, Version]) -> None:
    (before, buffers), (manifest, changed) = versions
    replica.load_weights(before, buffers)
    (index,) = manifest.changed_since(before)
    fetched = [ref if place == index else None for place, ref in enumerate(changed)]
    assert len(fetched) > 5
    assert replica.load_weights(manifest, fetched) == manifest.checksum != before.checksum
    assert replica.generate([REQUEST])[1].chains[0].text.version == 2


def test_a_paused_call_goes_on_with_the_version_it_was_paused_for(
    replica: RolloutReplica, versions: tuple[Version, Version]
) -> None:
    (first, buffers), (second, changed) = versions
    replica.load_weights(first, buffers)
    replica.pause(2)
    nothing, begun = replica.generate([REQUEST])
    assert nothing is None and all(0 < len(completion.ids) < 4 for completion in begun.completions)
    replica.load_weights(second, changed)
    stats, group = replica.generate([REQUEST], begun)
    assert [(chain.text.version, chain.image.version) for chain in group.chains] == [(1, 2)] * 2
    for chain, before in zip(group.chains, begun.completions, strict=True):
        assert chain.text.ids[: len(before.ids)].tolist() == before.ids and len(chain.text.ids) > len(before.ids)
    assert stats.version == 1 and stats.tokens == sum(len(chain.text.ids) for chain in group.chains)
    replica.pause(2)
    assert replica.generate([REQUEST])[0].version == 2, "late word of a version that is held already pauses nothing"


def test_what_can_be_paused_draws_the_same_chains_on_a_thread_of_its_own(
    replica: RolloutReplica, versions: tuple[Version, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray calls an actor that hears of pauses on another thread than built it."""
    with ThreadPoolExecutor(1) as thread:
        for version in versions:
            thread.submit(replica.load_weights, *version).result()
        there = thread.submit(replica.generate, [REQUEST]).result()[1]
    monkeypatch.setattr(replica, "config", replica.config.model_copy(update={"max_staleness": 0}))
    here = replica.generate([REQUEST])[1]
    for a, b in zip(there.chains, here.chains, strict=True):
        assert np.array_equal(a.text.ids, b.text.ids) and np.array_equal(a.text.logprobs, b.text.logprobs)
        assert np.array_equal(a.image.x_next, b.image.x_next) and np.array_equal(a.image.pixels, b.image.pixels)


def test_a_damaged_buffer_is_refused_by_name_and_mended_by_the_next_load(
    replica: RolloutReplica, versions: tuple[Version, Version]
) -> None:
    (manifest, buffers), other = versions
    (place,) = manifest.changed_since(other[0])
    damaged = np.array(ray.get(buffers[place]))
    damaged[-9] ^= 1
    replica.load_weights(*other)
    with pytest.raises(RuntimeError, match=f"version 1: .* not hold {manifest.buckets[place].names[-1]} as it was"):
        replica.load_weights(manifest, [*buffers[:place], ray.put(damaged), *buffers[place + 1 :]])
    with pytest.raises(RuntimeError, match="may hold a mixture"):
        replica.generate([REQUEST])
    assert replica.load_weights(manifest, buffers) == manifest.checksum
    replica.generate([REQUEST])


def test_with_adapters_these_alone_are_fetched_and_draw_as_the_merged_weights_do(local_ray: None) -> None:
    """A replica has the frozen base from the checkpoint it is built from."""
    config = load_config("flowgrpo", ["rollout.dtype=float32", "learner.lora={rank: 2}"])
    policy = open_policy(config.model, torch.float32, "cpu").policy
    add_adapters(policy, config.learner.lora)
    torch.manual_seed(0)
    trained = {name: torch.randn_like(p) / 9 for name, p in policy.named_parameters() if p.requires_grad}
    policy.load_state_dict(trained, strict=False)
    manifest, buffers = publish(dict(policy.named_parameters()), 1, limit=1 << 12)
    needed = [i for i, bucket in enumerate(manifest.buckets) if trained.keys() & set(bucket.names)]
    assert 0 < len(needed) < len(buffers) / 2
    replica = RolloutReplica(config)
    fetched = [ref if place in needed else None for place, ref in enumerate(buffers)]
    assert replica.load_weights(manifest, fetched) == manifest.checksum == replica.checksum(manifest)

    drawn = replica.generate([REQUEST])[1]
    merged = dict(plain_weights(policy, policy.state_dict()))
    plain = RolloutReplica(load_config("flowgrpo", ["rollout.dtype=float32"]))
    before = plain.generate([REQUEST])[1]
    plain.load_weights(*publish(merged, 1))
    after = plain.generate([REQUEST])[1]
    for with_adapters, start, wanted in zip(drawn.chains, before.chains, after.chains, strict=True):
        close = np.abs(with_adapters.image.pixels.astype(int) - wanted.image.pixels).max()
        assert close <= 1 < np.abs(start.image.pixels.astype(int) - wanted.image.pixels).max()
