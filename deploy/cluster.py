"""What the cluster has, and what its autoscaler may still add to it."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import yaml

from common.config import ConfigError

NODE_GROUPS = "UNIGRPO_NODE_GROUPS"
LAUNCHED = "ray_bootstrap_config.yaml"


def node_groups() -> list[tuple[dict[str, float], int]]:
    """Groups that may grow: the resources of one node and the most nodes.

    Ray tells a driver nothing of its autoscaler's limits. Ray's launcher leaves its configuration in the head's home
    directory; elsewhere (KubeRay) the variable UNIGRPO_NODE_GROUPS of the head holds the same mapping as JSON, as
    `available_node_types` of the launcher does. ConfigError if it does not.
    """
    launched = Path.home() / LAUNCHED
    try:
        if text := os.environ.get(NODE_GROUPS):
            groups: Mapping[str, Any] = json.loads(text)
        elif launched.is_file():
            groups = yaml.safe_load(launched.read_text())["available_node_types"]
        else:
            return []
        return [(dict(group["resources"]), int(group.get("max_workers", 0))) for group in groups.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{NODE_GROUPS} or ~/{LAUNCHED} does not describe groups of nodes ({error}); give "
            '{"rollout": {"resources": {"CPU": 8}, "max_workers": 4}}'
        ) from error


def capacity() -> dict[str, float]:
    """What the cluster has by resource, or will have with every node that may come."""
    later: dict[str, float] = defaultdict(float)
    for resources, most in node_groups():
        for name, amount in resources.items():
            later[name] += amount * most
    now = ray.cluster_resources()
    return {name: max(now.get(name, 0), later[name]) for name in now.keys() | later.keys()}


def nodes() -> list[dict[str, float]]:
    """The resources of every node that is there, and of one of each group that may grow."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return there + [resources for resources, most in node_groups() if most]
