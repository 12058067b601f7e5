"""On which addresses of this machine somebody listens."""

from __future__ import annotations

import psutil


def listening(port: int) -> set[str]:
    """The addresses on which this TCP port is open."""
    return {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
