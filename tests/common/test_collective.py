"""Broadcast between real processes over gloo: what arrives, what is left out, and what a lost member costs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from listening import listening

from common.runtime import thread_env
from common.transport import TransportError, collective
from common.transport.collective import CollectivePublication, CollectiveReceiver, CollectiveSender, Ticket
from common.types import WeightManifest
from common.weights import held_bucket, pack, unpack

NAMES = tuple("abcd")
SIZE = 1_000_000  # more than the sockets buffer, so that a sender notices who is not there
CPU = torch.device("cpu")
WAIT_S = 120.0
NOTHING = WeightManifest(-1, "float32", ())
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find test modules


def weights_of(version: int) -> dict[str, torch.Tensor]:
    """From version to version only b changes."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(SIZE, generator=generator) for name in NAMES}
    weights["b"] += version
    return weights


def packed(version: int) -> tuple[WeightManifest, list[torch.Tensor]]:
    """One bucket per tensor."""
    pairs = [
        pack([pair], torch.float32, torch.empty(4 * SIZE, dtype=torch.uint8)) for pair in weights_of(version).items()
    ]
    return WeightManifest(version, "float32", tuple(bucket for bucket, _ in pairs)), [flat for _, flat in pairs]


class Learner:
    """Sends what it is told, as the learner's first rank does."""

    def __init__(self) -> None:
        self.sender = CollectiveSender(CPU, WAIT_S)

    def address(self) -> str:
        return self.sender.address

    def send(self, version: int, name: str, replicas: int) -> list[int]:
        manifest, flats = packed(version)
        needed = self.sender.meet(name, replicas, manifest)
        for index in needed:
            self.sender.send(flats[index])
        return needed

    def kept(self, rounds: int) -> int:
        collective.KEPT_ROUNDS = rounds
        return self.sender._store.num_keys()

    def refuse(self, name: str) -> None:
        self.sender.refuse(name, "version 1 is past")


class Member:
    """Receives as a replica does; returns the names that travelled and the checksum of what it then holds."""

    def __init__(self) -> None:
        self.receiver = CollectiveReceiver(CPU, WAIT_S)
        self.weights = {name: torch.zeros(SIZE) for name in NAMES}
        self.held = NOTHING

    def load(self, manifest: WeightManifest, ticket: Ticket) -> tuple[list[str], str]:
        before, self.held, names = self.held, NOTHING, []
        for index, flat in self.receiver.receive(manifest, before, ticket):
            for name, tensor in unpack(manifest.buckets[index], flat, torch.float32):
                self.weights[name].copy_(tensor)
                names.append(name)
        held = tuple(held_bucket(bucket, self.weights) for bucket in manifest.buckets)
        self.held = WeightManifest(manifest.version, manifest.dtype, held)
        return names, self.held.checksum


class DyingMember(Member):
    """Dies as soon as the first bucket is there."""

    def load(self, manifest: WeightManifest, ticket: Ticket) -> tuple[list[str], str]:
        next(self.receiver.receive(manifest, NOTHING, ticket))
        os._exit(1)


def start(kind: type) -> Any:
    return ray.remote(kind).options(num_cpus=0, runtime_env={"env_vars": thread_env(0)}).remote()


@pytest.fixture(scope="module")
def learner(local_ray: None) -> Iterator[Any]:
    actor = start(Learner)
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def members(local_ray: None) -> Iterator[list[Any]]:
    actors = [start(Member) for _ in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def publication(learner: Any, version: int) -> tuple[CollectivePublication, list[ray.ObjectRef]]:
    sending: list[ray.ObjectRef] = []
    address = ray.get(learner.address.remote())
    begin = lambda name, replicas: sending.append(learner.send.remote(version, name, replicas))  # noqa: E731
    return CollectivePublication(packed(version)[0], address, begin, lambda: None), sending


def transfer(learner: Any, members: list[Any], version: int) -> list[list[str]]:
    """All members fetch a version; the names each was sent."""
    weights, sending = publication(learner, version)
    tickets = weights.tickets(len(members))
    loads = [m.load.remote(weights.manifest, ticket) for m, ticket in zip(members, tickets, strict=True)]
    results = ray.get(loads, timeout=WAIT_S)
    ray.get(sending, timeout=WAIT_S)
    assert {checksum for _, checksum in results} == {weights.manifest.checksum}
    return [names for names, _ in results]


def test_members_get_what_they_lack_and_a_lost_one_ends_nobody(learner: Any, members: list[Any]) -> None:
    everything, changed = list(NAMES), ["b"]
    host, _, port = ray.get(learner.address.remote()).rpartition(":")
    assert listening(int(port)) == {host}, "not on all of the machine's addresses"
    assert transfer(learner, members, 1) == [everything] * 2
    assert transfer(learner, members, 2) == [changed] * 2, "in the same group, and only what changed"
    members.append(start(Member))
    assert transfer(learner, members, 3) == [everything] * 3, "one joined that holds nothing"

    # One dies after the others have come: the round ends, and the next goes without it.
    weights, _ = publication(learner, 4)
    tickets = weights.tickets(3)
    ray.kill(members.pop())
    loads = [m.load.remote(weights.manifest, t) for m, t in zip(members, tickets, strict=False)]
    weights.give_up(tickets[2])
    for load in loads:
        with pytest.raises(TransportError, match="replica 2 of the round was lost"):
            ray.get(load, timeout=WAIT_S)
    assert transfer(learner, members, 4) == [everything] * 2, "after a failed load nothing is taken for granted"
    assert transfer(learner, members, 5) == [changed] * 2


def test_a_member_that_dies_in_the_middle_fails_the_round_for_all(learner: Any, members: list[Any]) -> None:
    transfer(learner, members, 6)
    dying = start(DyingMember)
    weights, sending = publication(learner, 7)
    loads = [m.load.remote(weights.manifest, t) for m, t in zip([*members, dying], weights.tickets(3), strict=True)]
    for load in [*loads[:2], *sending]:
        with pytest.raises(TransportError):
            ray.get(load, timeout=WAIT_S)
    assert transfer(learner, members, 7) == [list(NAMES)] * 2


def test_what_rounds_leave_behind_does_not_grow(learner: Any, members: list[Any]) -> None:
    ray.get(learner.kept.remote(2), timeout=WAIT_S)
    left = []
    for version in range(10, 14):
        transfer(learner, members, version)
        left.append(ray.get(learner.kept.remote(2), timeout=WAIT_S))
    assert len(set(left)) == 1


def test_a_round_can_be_refused(learner: Any, members: list[Any]) -> None:
    address = ray.get(learner.address.remote())
    learner.refuse.remote("late")
    with pytest.raises(TransportError, match="version 1 is past"):
        ray.get(members[0].load.remote(packed(1)[0], Ticket(address, "late", 0)), timeout=WAIT_S)
