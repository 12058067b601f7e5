"""ray_cluster.yaml is what Ray's launcher accepts, and fits the code it installs and starts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from common.config import REPOSITORY
from common.recipe import load_config
from deploy.preflight import check_resources, demands

FILE = REPOSITORY / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def commands(cluster: dict[str, Any]) -> list[str]:
    return [line for key, lines in cluster.items() if key.endswith("_commands") for line in lines]


def test_the_launcher_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)  # ray/autoscaler/ray-schema.json


def test_groups_have_room_and_the_head_takes_no_actors(cluster: dict[str, Any]) -> None:
    groups = cluster["available_node_types"]
    assert set(groups) == {"head", "learner", "rollout", "reward"}
    assert groups["head"]["resources"] == {"CPU": 0}
    workers = [group for name, group in groups.items() if name != "head"]
    assert all(0 <= group["min_workers"] <= group["max_workers"] for group in workers)
    assert sum(group["max_workers"] for group in workers) == cluster["max_workers"]


def test_the_default_recipe_fits_when_each_actor_is_kept_in_its_group(cluster: dict[str, Any]) -> None:
    groups = cluster["available_node_types"]
    kept = ["learner.custom.learner_node=1", "rollout.custom.rollout_node=1"]
    kept.append("rewards=[{name: shapes, custom: {reward_node: 1}}]")
    config = load_config("shapes", kept)
    capacity: dict[str, float] = {}
    for group in groups.values():
        for name, amount in group["resources"].items():
            capacity[name] = capacity.get(name, 0) + amount * group["max_workers"]
    check_resources(demands(config), capacity)
    assert all(demand.given.custom for demand in demands(config))


def test_token_authentication_is_on_everywhere(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert any(path.endswith(".ray/auth_token") for path in cluster["file_mounts"])
    assert all("--dashboard-host=127.0.0.1" in line for line in commands(cluster) if "ray start --head" in line)


def test_what_it_installs_exists(cluster: dict[str, Any]) -> None:
    lines = commands(cluster)
    locks = {lock for line in lines for lock in re.findall(r"LOCK=(\S+)", line)}
    assert locks and all((REPOSITORY / lock).is_file() for lock in locks)
    targets = {target for line in lines for target in re.findall(r"\bmake (\w+)", line)}
    makefile = (REPOSITORY / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert all("activate &&" in line for line in lines if re.search(r"\bray (start|stop)", line))
