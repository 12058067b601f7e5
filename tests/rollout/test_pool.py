"""The pool with real replicas: a killed replica loses nothing, and chains depend on their seeds alone."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from published import publish
from ray.exceptions import RayActorError

from common.actors import building
from common.bagel import checkpoint as store
from common.checkpoint_files import CheckpointError
from common.config import ConfigError, ReasonerResources, TrainConfig, resolve_path
from common.prompts import PromptOrder, read_prompts
from common.recipe import load_config
from common.transport import LostWeightsError
from common.transport.object_store import ObjectStorePublication
from common.types import Group, RolloutStats
from deploy.chaos.cluster import title
from deploy.requests import training_requests
from rollout.actor import RolloutReplica
from rollout.batch import Batch, RolloutError, Work
from rollout.pool import RolloutPool
from rollout.replica import PAUSE, STATES, Call, Replica

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
            "max_staleness=1",
        ],
    )


@pytest.fixture(scope="module")
def pool(local_ray: None, config: TrainConfig) -> Iterator[RolloutPool]:
    pool = RolloutPool(config)
    pool.wait_ready()
    policy = store.load(resolve_path(config.model.path)).policy
    pool.sync(ObjectStorePublication(*publish(dict(policy.named_parameters()), 7)))
    yield pool
    pool.close()


def submit(pool: RolloutPool, config: TrainConfig) -> Batch:
    order = PromptOrder(read_prompts(resolve_path(config.data.train)), 6, 0)
    return pool.submit(training_requests(config, order, 3))


def pids_of(pool: RolloutPool) -> list[int]:
    return ray.get([replica.handle.__ray_call__.remote(lambda _: os.getpid()) for replica in pool.replicas])


def answers(replica: Replica) -> str:
    """Which start of the actor does; none while Ray rebuilds it."""
    try:
        start: str = ray.get(replica.handle.ping.remote())
    except RayActorError:
        return ""
    return start


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def collect(pool: RolloutPool, config: TrainConfig, kill: bool = False) -> list[Group]:
    """One training step's groups in order; kill ends a replica once the first group is there."""
    batch = submit(pool, config)
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


def test_a_hung_and_a_killed_replica_are_restarted_and_given_the_weights(
    pool: RolloutPool, config: TrainConfig
) -> None:
    until(lambda: pool.serving == 2)
    calm, restarts = collect(pool, config), pool.restarts
    hung, killed = pool.replicas
    pids = pids_of(pool)
    os.kill(pids[1], signal.SIGKILL)
    # Ray rebuilds it before it is needed again, so that no call fails.
    until(lambda: answers(killed) not in ("", killed.answered))
    os.kill(pids[0], signal.SIGSTOP)
    batch = submit(pool, config)
    until(lambda: hung.call is not None and hung.call.kind == "generate")
    assert hung.call is not None
    hung.call.deadline = 0.0  # ten minutes later
    found = dict(batch.arrivals(DEADLINE_S))
    assert all(same(a, ray.get(found[place])) for place, a in enumerate(calm))
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    until(lambda: pool.serving == 2 and all(replica.holds is pool.weights for replica in pool.replicas))
    assert pool.restarts == restarts + 2
    assert pool.weights is not None
    manifest = pool.weights.manifest
    held = [replica.handle.checksum.remote(manifest) for replica in (hung, killed)]
    assert ray.get(held, timeout=30) == [manifest.checksum] * 2


def later(weights: ObjectStorePublication) -> ObjectStorePublication:
    """The same bytes as version 8."""
    return ObjectStorePublication(replace(weights.manifest, version=8), weights.buffers)


def test_groups_that_are_being_made_go_on_with_the_weights_of_an_update(pool: RolloutPool, config: TrainConfig) -> None:
    """Their reasoning is paused, the replica loads, the reasoning goes on, and the image is the new weights'."""
    until(lambda: pool.serving == 2)
    calm, weights = submit(pool, config), pool.weights
    first = [ray.get(ref) for _, ref in sorted(calm.arrivals(DEADLINE_S))]
    for replica in pool.replicas:
        # As if a version had been waiting since before the call: every call ends after a token or two.
        ray.get(replica.handle.pause.options(concurrency_group=PAUSE).remote(8))
    before, reruns = pool.continued_groups, pool.rerun_groups
    batch = submit(pool, config)
    until(lambda: pool.continued_groups >= before + 4)
    assert weights is not None
    pool.sync(later(weights))
    groups = [ray.get(ref) for _, ref in sorted(batch.arrivals(DEADLINE_S))]
    chains = [chain for group in groups for chain in group.chains]
    versions = {(chain.text.version, chain.image.version) for chain in chains}
    assert (7, 8) in versions and versions <= {(7, 7), (7, 8), (8, 8)}
    assert batch.versions == [min(chain.text.version for chain in group.chains) for group in groups]
    assert sum(stats.chains for stats in batch.stats) == len(chains) == 12 and pool.rerun_groups == reruns
    assert [[c.seed for c in g.chains] for g in groups] == [[c.seed for c in g.chains] for g in first]
    assert all(len(chain.text.ids) == len(chain.text.logprobs) for chain in chains)
    pool.sync(weights)


def test_a_publication_pauses_the_calls_under_way(pool: RolloutPool, config: TrainConfig) -> None:
    until(lambda: pool.serving == 2)
    pids = pids_of(pool)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    batch, weights = submit(pool, config), pool.weights
    until(lambda: all(replica.call is not None for replica in pool.replicas))
    calls = [replica.call for replica in pool.replicas]
    assert weights is not None
    again = ObjectStorePublication(weights.manifest, weights.buffers)
    thread = threading.Thread(target=pool.sync, args=(again,))
    thread.start()
    try:
        until(lambda: all(call is not None and call.pausing is again for call in calls))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    thread.join(DEADLINE_S)
    assert all(replica.holds is again for replica in pool.replicas)
    assert len(list(batch.arrivals(DEADLINE_S))) == 6


def test_late_news_of_a_death_is_no_try_and_no_restart(
    pool: RolloutPool, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may fail a call because of a death that came before it; here it does so at the first call."""
    until(lambda: pool.serving == 2)
    calm, restarts, reruns = collect(pool, config), pool.restarts, pool.rerun_groups
    replica, given = pool.replicas[0], []

    def refuse(work: Work) -> None:
        monkeypatch.undo()
        given.append(work)
        replica.call = call = Call("generate", Future(), math.inf, work=work)
        call.future.set_exception(RayActorError())
        replica._arrived(replica, call)

    monkeypatch.setattr(replica, "generate", refuse)
    found = collect(pool, config)
    assert all(same(a, b) for a, b in zip(calm, found, strict=True))
    until(lambda: pool.serving == 2 and replica.holds is pool.weights)
    assert [work.deaths for work in given] == [0] and pool.restarts == restarts and pool.rerun_groups == reruns + 1


def test_a_replica_whose_calls_raise_is_replaced_before_it_fails_its_work_for_good(
    pool: RolloutPool, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "raises"

    class Raises(RolloutReplica):
        # Until it is started afresh.
        def generate(self, *arguments: Any) -> Any:
            with suppress(FileExistsError):
                mark.symlink_to(self.start)
            if mark.readlink() == Path(self.start):
                raise OSError("the engine is dead")
            return super().generate(*arguments)

    until(lambda: pool.serving == 2)
    calm, restarts, reruns = collect(pool, config), pool.restarts, pool.rerun_groups
    monkeypatch.setattr("rollout.replica.RolloutReplica", Raises)
    pool.scale(3)
    until(lambda: pool.serving == 3 and all(replica.holds is pool.weights for replica in pool.replicas))
    assert all(same(a, b) for a, b in zip(calm, collect(pool, config), strict=True))
    until(lambda: pool.restarts == restarts + 1 and pool.serving == 3)
    assert pool.rerun_groups == reruns + 1
    pool.scale(2)
    until(lambda: len(pool.replicas) == 2)


def test_a_version_that_nobody_has_any_more_is_asked_for_anew(pool: RolloutPool, config: TrainConfig) -> None:
    """As after the end of the learner's node and of every replica at once."""

    class Owner:
        def put(self, values: list[Any]) -> list[ray.ObjectRef]:
            return [ray.put(ray.get(value)) for value in values]

    until(lambda: pool.serving == 2)
    calm, whole = collect(pool, config), pool.weights
    assert isinstance(whole, ObjectStorePublication)
    weights = store.load(resolve_path(config.model.path)).policy.named_parameters()
    manifest, buffers = publish({name: 1.01 * tensor.detach() for name, tensor in weights}, 8)
    owner = ray.remote(Owner).options(num_cpus=0).remote()
    pool.sync(ObjectStorePublication(manifest, ray.get(owner.put.remote(buffers))))
    ray.kill(owner)
    for pid in pids_of(pool):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(LostWeightsError, match="version 8 is lost with the learner's node"):
        list(submit(pool, config).arrivals(DEADLINE_S))
    with pytest.raises(LostWeightsError):
        submit(pool, config)
    pool.cancel()
    pool.sync(whole)
    assert all(same(a, b) for a, b in zip(calm, collect(pool, config), strict=True))


def reasoner_pids() -> list[int]:
    family = psutil.Process().children(recursive=True)
    return [process.pid for process in family if "ReasonerActor" in title(process)]


def test_a_reasoner_in_an_actor_of_its_own_draws_the_same_chains_and_is_replaced(
    pool: RolloutPool, config: TrainConfig
) -> None:
    calm, weights = collect(pool, config), pool.weights
    rollout = config.rollout.model_copy(update={"replicas": 1, "reasoner_actor": ReasonerResources()})
    assert weights is not None and reasoner_pids() == []
    apart = RolloutPool(config.model_copy(update={"run_name": "apart", "rollout": rollout}))
    try:
        apart.wait_ready()
        apart.sync(weights)
        assert all(same(a, b) for a, b in zip(calm, collect(apart, config), strict=True))
        (replica,), (first,) = apart.replicas, reasoner_pids()
        os.kill(first, signal.SIGKILL)
        # The replica does not go on without it.
        assert all(same(a, b) for a, b in zip(calm, collect(apart, config), strict=True))
        assert apart.restarts == 1 and replica.holds is weights and first not in reasoner_pids()
        # Nor does it hear of a pause any less.
        ray.get(replica.handle.pause.options(concurrency_group=PAUSE).remote(8))
        batch = submit(apart, config)
        until(lambda: apart.continued_groups > 0)
        apart.sync(later(weights))
        assert len(list(batch.arrivals(DEADLINE_S))) == 6 and 7 in batch.versions
    finally:
        apart.close()
    until(lambda: reasoner_pids() == [])


def test_replicas_join_and_leave_a_live_pool(
    pool: RolloutPool, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that joins with weights other than it was sent is started afresh; one that leaves finishes its groups."""
    mark = tmp_path / "wrong once"

    class WrongOnce(RolloutReplica):
        def load_weights(self, *arguments: Any) -> str:
            held = super().load_weights(*arguments)
            if mark.exists():
                return held
            mark.touch()
            return "0" * 32

    calm = collect(pool, config)
    monkeypatch.setattr("rollout.replica.RolloutReplica", WrongOnce)
    restarts = pool.restarts
    pool.scale(3)
    until(lambda: len(pool.replicas) == 3 and pool.replicas[2].serving and pool.replicas[2].holds is pool.weights)
    assert pool.restarts == restarts + 1 and pool.metrics()["rollout/replicas"] == 3
    joined = pool.replicas[2]
    assert joined.name not in {replica.name for replica in pool.replicas[:2]}

    # Within bounds the pool moves by itself: one that was idle for long leaves.
    pool.fewest, pool.most = 2, 3
    assert len(pool.replicas) == 3
    pool.replicas[2].idle_since = -pool.config.rollout.idle_s
    until(lambda: len(pool.replicas) == 2)

    batch = submit(pool, config)
    until(lambda: all(replica.call is not None for replica in pool.replicas))
    # Queued work that nobody takes asks for one; it goes, unbuilt, when it is not wanted any more.
    until(lambda: pool.metrics()["rollout/replicas_wanted"] == 3)
    pool.scale(1)
    found = [ref for _, ref in sorted(batch.arrivals(DEADLINE_S))]
    assert all(same(a, b) for a, b in zip(calm, ray.get(found), strict=True))
    assert sum(stats.chains for stats in batch.stats) == 12, "no group was made twice"
    until(lambda: len(pool.replicas) == 1)
    assert pool.states() == {pool.replicas[0].name: "idle"}
    until(lambda: pool.metrics()["rollout/idle"] == 1)
    metrics = pool.metrics()
    assert metrics["rollout/replicas_wanted"] == 1
    assert sum(metrics[f"rollout/{state}"] for state in STATES) == 1


def test_groups_that_are_there_are_not_made_again(pool: RolloutPool, config: TrainConfig) -> None:
    calm = submit(pool, config)
    found = dict(calm.arrivals(DEADLINE_S))
    places = (0, 2, 3, 5)
    kept = {place: (ray.put(f"kept {place}"), RolloutStats(6, 2, 9, 0, 0.0, 0.0, 0.0)) for place in places}
    batch = pool.submit(calm.requests, kept)
    groups = [ray.get(ref) for _, ref in sorted(batch.arrivals(DEADLINE_S))]
    assert [groups[place] for place in places] == [f"kept {place}" for place in places]
    assert all(same(groups[place], ray.get(found[place])) for place in (1, 4))
    assert batch.versions == [6, 7, 6, 6, 7, 6] and sum(stats.chains for stats in batch.stats) == 12
    assert 0 < batch.images_per_s < calm.images_per_s * 3
    whole = pool.submit(calm.requests, dict.fromkeys(range(6), kept[0]))
    assert len(list(whole.arrivals(DEADLINE_S))) == 6 and whole.images_per_s == 0


def test_cancelled_work_is_neither_begun_nor_missed(pool: RolloutPool, config: TrainConfig) -> None:
    abandoned = submit(pool, config)
    pool.cancel()
    calm = collect(pool, config)
    assert len(calm) == 6 and len(abandoned.refs) <= 1


def test_what_the_pool_waited_for_is_said(local_ray: None) -> None:
    config = load_config("shapes", ["run_name=roomless", "rollout.replicas=1", "rollout.cpus=64"])
    pool = RolloutPool(config.model_copy(update={"rollout": config.rollout.model_copy(update={"deadline_s": 1.0})}))
    try:
        roomless = r"no room: rollout-0, 64 CPU each, waited 1 s \(rollout.deadline_s\).* 2 CPU.* lower the cpus"
        with pytest.raises(ConfigError, match=roomless):
            pool.wait_ready()
        batch = submit(pool, config)
        with pytest.raises(ConfigError, match=roomless):
            next(batch.arrivals(0.1))
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("error", "heard", "said"),
    [
        (OSError, RolloutError, r"OSError: no such model"),
        (CheckpointError, ConfigError, r"on node 127\.0\.0\.1 \(.+\): no such model"),
    ],
)
def test_a_pool_whose_replicas_cannot_be_built_says_why(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, error: type[Exception], heard: type[Exception], said: str
) -> None:
    class Unbuildable:
        @building
        def __init__(self, config: TrainConfig) -> None:
            raise error("no such model")

        def ping(self) -> str:
            return ""

    monkeypatch.setattr("rollout.replica.RolloutReplica", Unbuildable)
    pool = RolloutPool(load_config("shapes", ["run_name=broken", "rollout.replicas=1"]))
    try:
        with pytest.raises(heard, match=f"3 faults .* cannot be built: {said}"):
            pool.wait_ready()
    finally:
        pool.close()
