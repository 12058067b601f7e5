"""Weights by broadcast in a process group of the learner's first rank and all replicas: NCCL on GPUs, gloo on CPUs.

Every transfer is a round. Its members meet at a key-value store that the learner's first rank serves: each says which
group it is in and which buckets it lacks; the learner answers with those that it will send, and whether the group of
the round before is kept. Whenever a replica was lost, joined, or failed in a round, a new group is formed, by the same
processes; nobody is restarted.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from common.transport import TransportError
from common.transport.store import join, serve
from common.types import WeightManifest
from common.weights import grown, nbytes

POLL_S = 0.01
KEPT_ROUNDS = 64  # of whose outcome a member that is late may still ask
CONNECT = timedelta(seconds=60)  # all members are there already


@dataclass(frozen=True)
class Ticket:
    """A replica's place (from 0) in a round, and where to meet."""

    address: str
    round: str
    place: int


@dataclass(frozen=True, eq=False)
class CollectivePublication:
    """begin(round, replicas) has the learner send this version to so many; check raises if it is lost; address is its
    store's."""

    manifest: WeightManifest
    address: str
    begin: Callable[[str, int], Any]
    check: Callable[[], None]
    together: ClassVar[bool] = True

    def tickets(self, replicas: int) -> list[Ticket]:
        name = uuid.uuid4().hex
        self.begin(name, replicas)
        return [Ticket(self.address, name, place) for place in range(replicas)]

    def give_up(self, ticket: Ticket) -> None:
        """The round ends without a transfer, unless it has begun: then its members notice by themselves. Returns at
        once: the learner's node may not answer."""

        def abort() -> None:
            with suppress(RuntimeError):  # the learner is gone too, and the round with it
                _abort(_connect(ticket.address), ticket.round, f"replica {ticket.place} of the round was lost")

        threading.Thread(target=abort, name="give up a round", daemon=True).start()


class Group:
    """A process group besides torch's default one, which belongs to DeepSpeed in the learner and to vLLM elsewhere."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int, device: torch.device, wait_s: float) -> None:
        """wait_s: longest wait for one broadcast. RuntimeError if a member does not connect."""
        self.name, self.size, self._wait = name, size, timedelta(seconds=wait_s)
        prefixed = dist.PrefixStore(name, store)
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = self._wait
            with _blocking_wait():
                self._group: Any = dist.ProcessGroupNCCL(prefixed, rank, size, nccl)
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())]
            gloo._timeout = min(self._wait, CONNECT)
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, gloo)

    def broadcast(self, flat: Tensor) -> None:
        """Bytes [n] of rank 0 to all."""
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, self._wait
        self._group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.synchronize()


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """A group of NCCL that is made meanwhile raises where a member is lost. By default its watchdog ends the process,
    the learner's too."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class CollectiveSender:
    """The learner's end, on its first rank."""

    def __init__(self, device: torch.device, wait_s: float) -> None:
        """wait_s: longest wait for a round's members, and for one bucket."""
        self.device, self.wait_s = device, wait_s
        host = ray.util.get_node_ip_address()
        self._store = serve(host, 0, wait_s)
        self.address = f"{host}:{self._store.port}"
        self._group: Group | None = None
        self._rounds: deque[list[str]] = deque()  # the keys of past ones, oldest first

    def meet(self, name: str, replicas: int, manifest: WeightManifest) -> list[int]:
        """Waits for the members of a round and forms their group: the indexes of the buckets that one of them lacks.
        TransportError if the round was given up, or a member does not come."""
        places = [f"{name}/{place}" for place in range(replicas)]
        self._forget([*places, f"{name}/go"])
        deadline = time.monotonic() + self.wait_s
        while not self._store.check(places):
            if self._store.check([f"{name}/go"]):
                raise TransportError(f"weights version {manifest.version}: the round was given up")
            if time.monotonic() > deadline:
                self.refuse(name, f"not all replicas came within {self.wait_s:.0f} s")
                raise TransportError(f"weights version {manifest.version}: not all replicas came")
            time.sleep(POLL_S)
        members = [json.loads(self._store.get(place)) for place in places]
        needed = sorted({index for member in members for index in member["lacks"]})
        group, self._group = self._group, None
        keep = group is not None and group.size == replicas + 1 and all(m["group"] == group.name for m in members)
        answer = json.dumps({"new": not keep, "size": replicas + 1, "buckets": needed})
        if self._store.compare_set(f"{name}/go", "", answer) != answer.encode():
            raise TransportError(f"weights version {manifest.version}: the round was given up")
        try:
            self._group = group if keep else Group(self._store, name, 0, replicas + 1, self.device, self.wait_s)
        except RuntimeError as error:
            raise TransportError(f"the group of {replicas} replicas could not be formed: {error}") from error
        return needed

    def _forget(self, keys: list[str]) -> None:
        """A run of weeks has a round at every step."""
        self._rounds.append(keys)
        while len(self._rounds) > KEPT_ROUNDS:
            for key in self._rounds.popleft():
                self._store.delete_key(key)

    def refuse(self, name: str, reason: str) -> None:
        """Tells the members of a round that it will not take place."""
        _abort(self._store, name, reason)

    def send(self, flat: Tensor) -> None:
        """One bucket. TransportError if a member was lost; then the group is, too."""
        assert self._group is not None
        try:
            self._group.broadcast(flat)
        except RuntimeError as error:
            self._group = None
            raise TransportError(f"a replica was lost while weights were sent: {error}") from error


class CollectiveReceiver:
    """A replica's end."""

    def __init__(self, device: torch.device, wait_s: float) -> None:
        self.device, self.wait_s = device, wait_s
        self._group: Group | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def receive(self, manifest: WeightManifest, held: WeightManifest, ticket: Ticket) -> Iterator[tuple[int, Tensor]]:
        group, self._group = self._group, None
        try:
            store = _connect(ticket.address)
            store.set_timeout(timedelta(seconds=self.wait_s))
            about = {"lacks": manifest.changed_since(held), "group": group.name if group else ""}
            store.set(f"{ticket.round}/{ticket.place}", json.dumps(about))
            answer = json.loads(store.get(f"{ticket.round}/go"))
            if "refused" in answer:
                raise TransportError(answer["refused"])
            if group is None or answer["new"]:
                group = Group(store, ticket.round, ticket.place + 1, answer["size"], self.device, self.wait_s)
            dtype = getattr(torch, manifest.dtype)
            for index in answer["buckets"]:
                size = nbytes(manifest.buckets[index].shapes, dtype)
                self._scratch = grown(self._scratch, size)
                group.broadcast(self._scratch[:size])
                yield index, self._scratch[:size]
        except RuntimeError as error:
            raise TransportError(f"weights version {manifest.version} did not arrive: {error}") from error
        self._group = group


def _connect(address: str) -> dist.TCPStore:
    host, _, port = address.rpartition(":")
    return join(host, int(port), 10)


def _abort(store: dist.Store, name: str, reason: str) -> None:
    store.compare_set(f"{name}/go", "", json.dumps({"refused": reason}))
