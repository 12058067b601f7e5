"""What a process learns of its machine."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from common.actors import building, options
from common.config import ConfigError, Resources
from common.runtime import DRIVER_HAS, engines, free_port, thread_env

PRODUCTS = """
import ctypes, torch
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
info = ctypes.CDLL("libc.so.6").mallinfo2
info.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
weight = torch.randn(256, 128).bfloat16().requires_grad_()
for rows in range(64, 564):
    if rows == 264:
        before = info().uordblks
    torch.nn.functional.linear(torch.randn(rows, 128).bfloat16(), weight).sum().backward()
print((info().uordblks - before) >> 20)
"""


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
        server.listen()


def test_no_free_port_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: socket.socket, address: object) -> None:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(socket.socket, "bind", full)
    with pytest.raises(ConfigError, match=r"no free TCP port .*Address already in use.*ip_local_port_range"):
        free_port()


def test_an_actor_on_a_node_with_other_releases_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    init = building(built.append)
    assert {"torch", "vllm", "deepspeed"} <= engines().keys() and "+" not in "".join(engines().values())
    monkeypatch.setenv(DRIVER_HAS, json.dumps(engines()))
    init("alike")
    monkeypatch.setenv(DRIVER_HAS, json.dumps(engines() | {"vllm": "0.1"}))
    with pytest.raises(ConfigError, match=r"^on node .+: vllm 0\.1 at the driver, \d.* here; install the same lock"):
        init("other")
    assert built == ["alike"]


def test_products_of_ever_new_shapes_leave_no_memory_behind() -> None:
    """Every step's batches have shapes of their own; where the CPU multiplies bf16, each leaves a kernel in caches."""
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, env=os.environ | thread_env(1), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30, "megabytes more after 300 shapes"


def test_an_actor_without_gpus_sees_none() -> None:
    """Ray leaves all of a node's to an actor that asked for none."""
    assert options(Resources(cpus=1))["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in options(Resources(cpus=1, gpus=0.5))["runtime_env"]["env_vars"]
