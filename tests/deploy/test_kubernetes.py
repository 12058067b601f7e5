"""The KubeRay manifests fit the operator's schema, each other, and the code."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from typing import Any

import pytest
import yaml
from kuberay_schema import RayCluster, RayJob, Workers, manifest
from pydantic import ValidationError

from common.config import REPOSITORY
from common.recipe import load_config
from deploy.cluster import NODE_GROUPS
from deploy.preflight import check_fits, check_resources, demands

FILES = REPOSITORY / "deploy" / "kuberay"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FILES / name).read_text())


@pytest.fixture(scope="module")
def cluster() -> RayCluster:
    found = manifest(read("raycluster.yaml"))
    assert isinstance(found, RayCluster)
    return found


@pytest.fixture(scope="module")
def job() -> RayJob:
    found = manifest(read("rayjob.yaml"))
    assert isinstance(found, RayJob)
    return found


def test_the_schema_refuses_what_the_operator_would() -> None:
    wrong = read("raycluster.yaml")
    wrong["spec"]["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] = 16
    with pytest.raises(ValidationError, match="num-cpus"):
        manifest(wrong)
    wrong = read("rayjob.yaml")
    wrong["spec"]["entryPoint"] = wrong["spec"].pop("entrypoint")
    with pytest.raises(ValidationError, match="entrypoint"):
        manifest(wrong)


def offered(group: Workers) -> dict[str, float]:
    """What one node of a group tells Ray it has."""
    custom = json.loads(
        json.loads(group.rayStartParams["resources"])
    )  # the operator puts the text into a shell command
    return {"CPU": float(group.rayStartParams["num-cpus"]), **custom}


def test_groups_are_those_of_the_launcher(cluster: RayCluster) -> None:
    launcher = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())["available_node_types"]
    assert {g.groupName for g in cluster.spec.workerGroupSpecs} == set(launcher) - {"head"}
    for group in cluster.spec.workerGroupSpecs:
        other = launcher[group.groupName]
        assert offered(group) == other["resources"]
        assert (group.minReplicas, group.maxReplicas) == (other["min_workers"], other["max_workers"])
        assert group.minReplicas <= group.replicas <= group.maxReplicas
        (container,) = group.template.spec.containers
        assert container.resources.limits["cpu"] == group.rayStartParams["num-cpus"]
    assert cluster.spec.headGroupSpec.rayStartParams["num-cpus"] == "0"


def test_the_head_knows_what_the_groups_may_grow_to(cluster: RayCluster) -> None:
    (head,) = cluster.spec.headGroupSpec.template.spec.containers
    (variable,) = [v for v in head.env if v.name == NODE_GROUPS]
    assert json.loads(variable.value or "") == {
        g.groupName: {"resources": offered(g), "max_workers": g.maxReplicas} for g in cluster.spec.workerGroupSpecs
    }


def test_the_job_fits_the_cluster_with_each_actor_in_its_group(cluster: RayCluster, job: RayJob) -> None:
    command, verb, recipe, *overrides = shlex.split(job.spec.entrypoint)
    assert (command, verb) == ("unigrpo", "train")
    config = load_config(recipe, overrides)
    nodes = [offered(group) for group in cluster.spec.workerGroupSpecs]
    capacity: dict[str, float] = {}
    for group, node in zip(cluster.spec.workerGroupSpecs, nodes, strict=True):
        for name, amount in node.items():
            capacity[name] = capacity.get(name, 0) + amount * group.maxReplicas
    check_resources(demands(config), capacity)
    check_fits(demands(config), nodes)
    assert all(demand.given.custom for demand in demands(config))
    assert job.spec.clusterSelector == {"ray.io/cluster": cluster.metadata.name}


def test_every_pod_is_authenticated_and_sees_the_shared_directory(cluster: RayCluster) -> None:
    assert cluster.spec.authOptions.mode == "token" and cluster.spec.headGroupSpec.serviceType == "ClusterIP"
    assert cluster.spec.rayVersion == importlib.metadata.version("ray")
    for group in (cluster.spec.headGroupSpec, *cluster.spec.workerGroupSpecs):
        (container,) = group.template.spec.containers
        home = next(v.value for v in container.env if v.name == "UNIGRPO_HOME")
        mounts = {mount.name: mount.mountPath for mount in container.volumeMounts}
        assert home is not None and home.startswith(mounts["shared"] + "/")
        assert mounts.keys() == {volume.name for volume in group.template.spec.volumes}
        assert all(v.valueFrom for v in container.env if v.name.endswith(("KEY", "TOKEN")))
        port = next(port.containerPort for port in container.ports if port.name == "metrics")
        assert group.rayStartParams["metrics-export-port"] == str(port)


def test_prometheus_finds_the_pods(cluster: RayCluster) -> None:
    monitor = read("podmonitor.yaml")
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/cluster": cluster.metadata.name}
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
