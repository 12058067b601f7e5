"""The key-value store at which processes meet before they form a group."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist


def serve(host: str, port: int, wait_s: float, members: int | None = None) -> dist.TCPStore:
    """A store that listens on this address of the machine alone, at any free port for 0; torch's own listens on all
    addresses. Waits for so many members, itself included, to come; OSError if the port is taken."""
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        members,
        True,
        timedelta(seconds=wait_s),
        wait_for_workers=members is not None,
        master_listen_fd=listening.detach(),
    )


def join(host: str, port: int, wait_s: float, members: int | None = None) -> dist.TCPStore:
    """The same store from another process. RuntimeError if nobody answers in time."""
    return dist.TCPStore(host, port, members, False, timedelta(seconds=wait_s), wait_for_workers=members is not None)
