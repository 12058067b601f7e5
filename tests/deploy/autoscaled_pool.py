"""A rollout pool between 1 and 3 replicas on a cluster whose nodes come and go by Ray's own autoscaler.

The head takes no actors and every node has room for one replica. Pool, placement groups and autoscaler (the one that
`ray up` and KubeRay start) are real. Its node provider is Ray's fake one, which starts raylets on this machine, and the
replicas' engines are simulated: they sleep. `ray.cluster_utils.AutoscalingCluster` begins with `ray stop`, which ends
every cluster of the machine. Run in a process of its own, with a port for the head and a directory for what was seen.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD, HEAD_TYPE = "f" * 51 + "0" * 5, "ray.head.default"  # the names by which that provider knows the head
os.environ.update(RAY_enable_autoscaler_v2="1", RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1")

import ray  # noqa: E402 (reads the environment)
from ray.cluster_utils import Cluster  # noqa: E402

from common.config import TrainConfig, resolve_path  # noqa: E402
from common.prompts import PromptOrder, read_prompts  # noqa: E402
from common.recipe import load_config  # noqa: E402
from common.transport.object_store import ObjectStorePublication  # noqa: E402
from common.types import RolloutRequest, RolloutStats, WeightBucket, WeightManifest  # noqa: E402
from deploy.requests import training_requests  # noqa: E402
from rollout import replica  # noqa: E402
from rollout.pool import RolloutPool  # noqa: E402

UNUSED = ("setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files")
GROUPS, CALL_S, DEADLINE_S = 8, 1.0, 150


class SimulatedEngine:
    """Not an engine: sleeps, and says with which weights and where it worked."""

    def __init__(self, config: TrainConfig) -> None:
        self.version, self.start = -1, uuid.uuid4().hex

    def ping(self) -> str:
        return self.start

    def load_weights(self, manifest: WeightManifest, ticket: Any) -> str:
        self.version = manifest.version
        return manifest.checksum

    def generate(self, requests: list[RolloutRequest], begun: None, holding: int) -> tuple[Any, ...]:
        time.sleep(CALL_S)
        stats = RolloutStats(self.version, len(requests), 0, 0, CALL_S, 0.0, time.time())
        return stats, *(ray.get_runtime_context().get_node_id() for _ in requests)


def autoscaling(port: int) -> dict[str, Any]:
    """A cluster launcher's file: a head without room, and up to three nodes for a replica each."""
    rollout = {"resources": {"CPU": 1, "object_store_memory": 80 << 20}, "node_config": {}, "max_workers": 3}
    return {
        "cluster_name": "autoscaled",
        "max_workers": 3,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD_TYPE,
        **{key: [] for key in UNUSED},
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "rollout": rollout,
        },
    }


def nodes() -> int:
    """Nodes that are alive, besides the head."""
    return sum(node["Alive"] for node in ray.nodes()) - 1


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}; {nodes()} nodes")
        time.sleep(0.1)


def observe() -> dict[str, Any]:
    """Nodes with one replica, under load, and when all is done; which node made each group, with which weights."""
    options = ["min_replicas=1", "replicas=1", "max_replicas=3", "cpus=1", "idle_s=1", "groups_per_call=1"]
    config = load_config(
        "shapes", [f"data.prompts_per_step={GROUPS}", "run_name=autoscaled", *(f"rollout.{o}" for o in options)]
    )
    pool = RolloutPool(config)
    try:
        pool.wait_ready()
        few = nodes()
        manifest = WeightManifest(7, "bfloat16", (WeightBucket((), (), ()),))
        pool.sync(ObjectStorePublication(manifest, [ray.put(b"")]))
        order = PromptOrder(read_prompts(resolve_path(config.data.train)), GROUPS, 0)
        most, seen = 0, {}
        # Steps follow each other until all nodes have worked: a node takes its time to come.
        for step in range(DEADLINE_S):
            batch = pool.submit(training_requests(config, order, step))
            seen[step] = [ray.get(ref) for _, ref in sorted(batch.arrivals(DEADLINE_S))]
            assert set(batch.versions) == {7} and len(batch.stats) == GROUPS
            most = max(most, nodes())
            if len(set(seen[step])) == 3:
                break
        until(lambda: len(pool.replicas) == 1, "idle replicas did not leave")
        until(lambda: nodes() == 1, "idle nodes were not given back")
        return {"few": few, "most": most, "left": nodes(), "workers": len(set(seen[max(seen)]))}
    finally:
        pool.close()


def main() -> None:
    port, path = int(sys.argv[1]), Path(sys.argv[2], "autoscaling.json")
    path.write_text(json.dumps(autoscaling(port)))
    replica.RolloutReplica = SimulatedEngine  # type: ignore[misc, assignment]
    names = ("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "node_ip_address": "127.0.0.1", "num_cpus": 0, "object_store_memory": 80 << 20, "gcs_server_port": port,
            "autoscaling_config": str(path), "include_dashboard": False, "env_vars": dict.fromkeys(names, HEAD),
        },
    )  # fmt: skip
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        path.with_name("seen.json").write_text(json.dumps(observe()))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
