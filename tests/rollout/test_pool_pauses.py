"""What the pool does with work that is paused, urgent, or given to a replica without the weights. Its replicas are
scripted; test_pool.py has real ones."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from common.config import TrainConfig
from common.recipe import load_config
from common.transport import LostWeightsError, TransportError
from common.transport.object_store import ObjectStorePublication
from common.types import Prompt, RolloutRequest, RolloutStats, WeightManifest
from rollout.actor import ForgottenWeightsError
from rollout.pool import RolloutPool
from rollout.replica import Replica

DEADLINE_S = 60
REQUESTS = [RolloutRequest(Prompt(str(i), "p", {}), 0, (2 * i, 2 * i + 1), None, 3) for i in range(2)]


@dataclass
class Ref:
    """A reference that says when it is there."""

    future_: Future[Any] = field(default_factory=Future)

    def future(self) -> Future[Any]:
        return self.future_


@dataclass
class Method:
    """A method of the scripted actor."""

    call: Any

    def options(self, **options: Any) -> Method:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class Script:
    """An actor that acknowledges every load, and ends a generation when it is paused or told to."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.under_way: Ref | None = None
        self.fails_to_load: Exception | None = None
        self.generating = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self, f"_{name}"))

    def _ping(self) -> Ref:
        return done("first start")

    def _load_weights(self, manifest: WeightManifest, ticket: Any) -> Ref:
        self.heard.append(("load", manifest.version))
        if self.fails_to_load:
            return failed(self.fails_to_load)
        return done(manifest.checksum)

    def _pause(self, version: int) -> None:
        self.heard.append(("pause", version))
        assert self.under_way is not None
        self.under_way.future_.set_result(None)

    def _generate(self, requests: list[RolloutRequest], begun: Any, holding: int) -> list[Any]:
        self.asked, self.holding = requests, holding
        self.heard.append(("generate", begun))
        self.under_way = Ref()
        self.generating.release()
        return [self.under_way, f"{len(self.heard)}: first", f"{len(self.heard)}: second"]

    def end(self, version: int) -> None:
        assert self.under_way is not None
        self.under_way.future_.set_result(RolloutStats(version, 4, 8, 0, 0.1, 0.1, 0.0))


def done(value: Any) -> Ref:
    ref = Ref()
    ref.future_.set_result(value)
    return ref


def failed(cause: Exception) -> Ref:
    ref = Ref()
    ref.future_.set_exception(RayTaskError("method", "trace", cause))
    return ref


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setattr("rollout.pool.ray.put", lambda value: value)
    return Script()


def scripted_pool(scripts: list[Script]) -> RolloutPool:
    class Scripted(Replica):
        def start(self, config: TrainConfig) -> Any:
            return scripts[int(self.name.removeprefix("rollout-"))]

        def has_room(self) -> bool:
            return True

        def restart(self) -> None:
            pass

        def end(self) -> None:
            pass

    options = [f"rollout.replicas={len(scripts)}", "rollout.groups_per_call=2", "max_staleness=1"]
    pool = RolloutPool(load_config("shapes", options), replica_type=Scripted)
    pool.wait_ready()
    return pool


@pytest.fixture
def pool(script: Script) -> Any:
    pool = scripted_pool([script])
    yield pool
    pool.close()


def version(number: int) -> ObjectStorePublication:
    publication = ObjectStorePublication(WeightManifest(number, "float32", ()), [])
    publication.__dict__["_ticket"] = "ticket"
    return publication


def begin(pool: RolloutPool, script: Script) -> Any:
    pool.sync(version(7))
    batch = pool.submit(REQUESTS)
    assert script.generating.acquire(timeout=DEADLINE_S)
    return batch


def test_paused_work_goes_on_after_the_load(pool: RolloutPool, script: Script) -> None:
    batch = begin(pool, script)
    pool.sync(version(8))
    assert script.generating.acquire(timeout=DEADLINE_S)
    script.end(7)
    assert dict(batch.arrivals(DEADLINE_S)) == {0: "5: first", 1: "5: second"}
    assert script.heard == [("load", 7), ("generate", None), ("pause", 8), ("load", 8), ("generate", "2: first")]
    assert batch.versions == [7, 7] and pool.metrics()["rollout/continued_groups"] == 2 and pool.rerun_groups == 0


def test_paused_work_that_fails_begins_anew(pool: RolloutPool, script: Script) -> None:
    """What it had begun may be what was lost."""
    begin(pool, script)
    pool.sync(version(8))
    assert script.generating.acquire(timeout=DEADLINE_S) and script.under_way is not None
    script.under_way.future_.set_exception(RuntimeError("lost"))
    assert script.generating.acquire(timeout=DEADLINE_S)
    assert script.heard[-1] == ("generate", None) and pool.rerun_groups == 2


def test_paused_work_that_nobody_wants_is_forgotten(pool: RolloutPool, script: Script) -> None:
    begin(pool, script)
    pool.cancel()
    pool.sync(version(8))
    assert script.heard[-1] == ("load", 8) and pool.continued_groups == 0
    pool.submit(REQUESTS)
    assert script.generating.acquire(timeout=DEADLINE_S) and script.heard[-1] == ("generate", None)


def test_a_replica_that_was_rebuilt_while_idle_loads_before_it_generates(pool: RolloutPool, script: Script) -> None:
    batch = begin(pool, script)
    assert script.holding == 7 and script.under_way is not None
    cause = ForgottenWeightsError("weights version 7 is wanted, but -1 is held")
    script.under_way.future_.set_exception(RayTaskError("generate", "trace", cause))
    assert script.generating.acquire(timeout=DEADLINE_S)
    script.end(7)
    assert len(dict(batch.arrivals(DEADLINE_S))) == 2 and pool.restarts == 1
    assert [name for name, _ in script.heard] == ["load", "generate", "load", "generate"]


def test_what_is_waited_for_goes_before_what_is_queued(pool: RolloutPool, script: Script) -> None:
    begin(pool, script)
    ahead, urgent = pool.submit(REQUESTS), pool.submit(REQUESTS[::-1] * 2, first=True)
    script.end(7)
    for asked in (REQUESTS[::-1], REQUESTS[::-1], REQUESTS):
        assert script.generating.acquire(timeout=DEADLINE_S)
        assert script.asked == asked
        script.end(7)
    assert [len(dict(batch.arrivals(DEADLINE_S))) for batch in (urgent, ahead)] == [4, 2]


def test_weights_whose_sender_is_lost_are_asked_for_anew(pool: RolloutPool, script: Script) -> None:
    class Dead(ObjectStorePublication):
        def check(self) -> None:
            raise RuntimeError("rank 0 died")

    weights = version(8)
    pool.sync(weights)
    dead = Dead(weights.manifest, [])
    dead.__dict__["_ticket"] = "ticket"
    script.fails_to_load = TransportError("nobody answers")
    batch = pool.submit(REQUESTS)
    assert script.generating.acquire(timeout=DEADLINE_S)
    pool.weights = dead  # as if all had died since they acknowledged it
    script.end(8)
    with pytest.raises(LostWeightsError, match="version 8 cannot be sent: rank 0 died"):
        list(pool.submit(REQUESTS, first=True).arrivals(DEADLINE_S))
    script.fails_to_load = None
    pool.cancel()
    pool.sync(version(9))
    assert script.heard[-1] == ("load", 9) and len(list(batch.arrivals(DEADLINE_S))) == 2


def test_a_transfer_that_all_take_part_in_begins_when_the_last_is_free(script: Script) -> None:
    taken: list[int] = []

    class Together(ObjectStorePublication):
        together = True

        def tickets(self, replicas: int) -> list[Any]:
            taken.append(replicas)
            return ["ticket"] * replicas

    scripts = [script, Script(), Script()]
    pool = scripted_pool(scripts)
    try:
        pool.sync(version(7))
        pool.submit(REQUESTS)
        deadline = time.monotonic() + DEADLINE_S
        while not (busy := [s for s in scripts if s.under_way]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pool.sync(Together(version(8).manifest, []))
    finally:
        pool.close()
    assert taken == [3], "those that were free have waited for the one that was paused"
    assert [("pause", 8) in s.heard for s in scripts] == [s is busy[0] for s in scripts]
    assert all(("load", 8) in s.heard for s in scripts)
