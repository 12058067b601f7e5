"""The pool with real replicas: a killed replica loses nothing, and chains depend on their seeds alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError

from common.bagel import checkpoint as store
from common.config import TrainConfig, load_config, resolve_path
from common.prompts import PromptOrder, read_prompts
from common.types import Group
from common.weights import pack
from deploy.requests import training_requests
from rollout.pool import RolloutPool

DEADLINE_S = 200


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return load_config(
        "shapes",
        [
            "run_name=pool",
            "rollout.dtype=float32",
            "data.prompts_per_step=6",
            "data.group_size=2",
            "rollout.groups_per_call=1",
        ],
    )


@pytest.fixture(scope="module")
def pool(local_ray: None, config: TrainConfig) -> Iterator[RolloutPool]:
    pool = RolloutPool(config)
    pool.wait_ready()
    policy = store.load(resolve_path(config.model.path)).policy
    named = [pair for pairs in policy.parameter_groups().values() for pair in pairs]
    manifest, buffer = pack(named, 7, torch.float32)
    pool.sync(manifest, ray.put(buffer))
    yield pool
    pool.close()


def collect(pool: RolloutPool, config: TrainConfig, kill: bool = False) -> list[Group]:
    """One training step's groups in order; kill ends a replica once the first group is there."""
    order = PromptOrder(read_prompts(resolve_path(config.data.train)), 6, 0)
    batch = pool.submit(training_requests(config, order, 3))
    found: dict[int, Group] = {}
    for place, ref in batch.arrivals(DEADLINE_S):
        found[place] = ray.get(ref)
        if kill:
            ray.kill(pool.replicas[0].handle, no_restart=False)
            kill = False
    return [found[place] for place in range(6)]


def same(a: Group, b: Group) -> bool:
    return a.prompt.id == b.prompt.id and all(
        np.array_equal(x.text.ids, y.text.ids) and np.array_equal(x.image.x_next, y.image.x_next)
        for x, y in zip(a.chains, b.chains, strict=True)
    )


def test_chains_depend_on_their_seeds_alone_even_when_a_replica_is_killed(
    pool: RolloutPool, config: TrainConfig
) -> None:
    calm = collect(pool, config)
    assert all(chain.text.version == 7 for group in calm for chain in group.chains)
    assert len({group.prompt.id for group in calm}) == 6
    stormy = collect(pool, config, kill=True)
    assert all(same(a, b) for a, b in zip(calm, stormy, strict=True))


def test_a_restarted_replica_is_given_the_weights_before_it_works(pool: RolloutPool, config: TrainConfig) -> None:
    ray.kill(pool.replicas[1].handle, no_restart=False)
    groups = collect(pool, config)
    assert all(chain.text.version == 7 for group in groups for chain in group.chains)
    deadline = time.monotonic() + DEADLINE_S
    versions: list[int] = []
    while versions != [7, 7] and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            versions = [ray.get(replica.handle.ping.remote(), timeout=30) for replica in pool.replicas]
        except RayActorError:
            collect(pool, config)  # the pool notices a loss when it hands out work
    assert versions == [7, 7]
