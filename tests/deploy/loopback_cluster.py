"""A Ray cluster of several nodes on this machine's loopback, in a process of its own, until its input closes.

A head that takes no actors, a learner node and a rollout node; prints "up" once all have joined. `ray
start` adds no node to a cluster that keeps to loopback, Ray's own test cluster does.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

COMMON = {"node_ip_address": "127.0.0.1", "object_store_memory": 150 << 20}


def main() -> None:
    head = COMMON | {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1"} | json.loads(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for group in ("learner", "rollout"):
        cluster.add_node(num_cpus=1, resources={f"{group}_node": 1000}, **COMMON)
    print("up", flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
