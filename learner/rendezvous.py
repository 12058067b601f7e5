"""Where the ranks meet. Apart from its caller, since the task's process imports this file: without torch it answers
seconds earlier."""

from __future__ import annotations

import ray

from common.runtime import free_port


@ray.remote(num_cpus=0)
def rendezvous() -> str:
    """host:port for rank 0 to listen on; runs on rank 0's node, which the driver does not know."""
    return f"{ray.util.get_node_ip_address()}:{free_port()}"
