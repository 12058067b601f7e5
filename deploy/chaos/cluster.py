"""A Ray cluster of several nodes on this machine, made to lose them."""

from __future__ import annotations

import os
import secrets
from typing import Any

import numpy as np
import psutil

ACTORS = {"rollout": "RolloutReplica", "reward": "RewardActor", "learner": "LearnerRank"}
"""The classes of the actors, which Ray makes part of their processes' titles."""
NODES, NODE_CPUS = 3, 1.0


class Cluster:
    """Ray on this machine alone, with a token of its own: a head without resources and NODES nodes."""

    def __init__(self) -> None:
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        from ray.cluster_utils import Cluster as Raylets

        # A lost node is noticed within seconds instead of half a minute.
        health = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000}
        head = {"num_cpus": 0, "object_store_memory": 200 << 20, "_system_config": health, "include_dashboard": False}
        self._raylets = Raylets(initialize_head=True, head_node_args=head)
        self._nodes = [self._add() for _ in range(NODES)]
        self.seen: set[psutil.Process] = set()
        """Every process of the cluster that was looked at."""
        self.address: str = self._raylets.address

    def _add(self) -> Any:
        return self._raylets.add_node(num_cpus=NODE_CPUS, object_store_memory=200 << 20)

    def replace_node(self, random: np.random.Generator) -> None:
        """Kills a node with all that runs on it; another one joins."""
        self.processes()
        node = self._nodes.pop(int(random.integers(len(self._nodes))))
        self._raylets.remove_node(node, allow_graceful=False)
        self._nodes.append(self._add())

    def processes(self) -> list[psutil.Process]:
        """Everything that runs under the cluster's raylets."""
        found = []
        for node in self._raylets.list_all_nodes():
            for kind in node.all_processes.values():
                for info in kind:
                    found += _family(info.process.pid)
        self.seen.update(found)
        return found

    def actors(self, kind: str) -> list[psutil.Process]:
        """Processes of one kind of actor, in the order of their ids."""
        found = {process: title(process) for process in self.processes()}
        return sorted((p for p, t in found.items() if t.startswith("ray::") and ACTORS[kind] in t), key=lambda p: p.pid)

    def kill_actor(self, kind: str, random: np.random.Generator) -> bool:
        """Kills one actor of a kind; False if none has a process now."""
        victims = self.actors(kind)
        try:
            if victims:
                victims[int(random.integers(len(victims)))].kill()
        except psutil.NoSuchProcess:
            return False
        return bool(victims)

    def close(self) -> None:
        """Ends all nodes."""
        self._raylets.shutdown()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:  # it has ended
        return []


def title(process: psutil.Process) -> str:
    """What a process calls itself; Ray gives its workers names. Empty once it has ended."""
    try:
        running = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return " ".join(process.cmdline()) if running else ""
    except psutil.Error:  # it has ended
        return ""
