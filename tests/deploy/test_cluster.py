"""Nodes that an autoscaler may still add count as room."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import ConfigError
from deploy import cluster

GROUPS = {
    "head": {"resources": {"CPU": 0}, "max_workers": 0},
    "rollout": {"resources": {"CPU": 8, "rollout_node": 1000}, "max_workers": 3},
}


@pytest.fixture(autouse=True)
def small_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(cluster.NODE_GROUPS, raising=False)
    there = {"CPU": 4.0, "memory": 1.0}
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(
        cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": there}, {"Alive": False, "Resources": {"CPU": 99}}]
    )


@pytest.mark.parametrize("source", ["launcher", "variable"])
def test_nodes_that_may_come_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    assert cluster.capacity() == {"CPU": 4.0, "memory": 1.0}
    assert cluster.nodes() == [{"CPU": 4.0, "memory": 1.0}]
    if source == "launcher":
        (tmp_path / cluster.LAUNCHED).write_text(json.dumps({"available_node_types": GROUPS}))
    else:
        monkeypatch.setenv(cluster.NODE_GROUPS, json.dumps(GROUPS))
    assert cluster.capacity() == {"CPU": 24, "rollout_node": 3000, "memory": 1.0}
    assert cluster.nodes() == [{"CPU": 4.0, "memory": 1.0}, {"CPU": 8, "rollout_node": 1000}]


@pytest.mark.parametrize("text", ["{", "[]", '{"rollout": {"max_workers": 3}}', '{"rollout": 3}'])
def test_a_variable_that_describes_nothing(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(cluster.NODE_GROUPS, text)
    with pytest.raises(ConfigError, match=r"UNIGRPO_NODE_GROUPS .*does not describe groups of nodes.*max_workers"):
        cluster.capacity()
