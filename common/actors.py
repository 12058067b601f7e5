"""What all actors have in common: their room in the cluster, and how one that cannot be built says why."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config import ConfigError, Resources
from common.runtime import DRIVER_HAS, check_engines, engines, thread_env

P = ParamSpec("P")


class Placement:
    """A placement group, which Ray's autoscaler adds nodes for, for `count` actors that are each given the same and for
    others beside them: all of them or none, on as few nodes as possible. Ray moves it when a node is lost."""

    def __init__(
        self,
        resources: Mapping[str, float],
        count: int = 1,
        name: str = "",
        beside: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self.each, self.beside = _bundle(resources), [_bundle(others) for others in beside]
        self._group = placement_group([self.each] * count + self.beside, strategy="PACK", name=name)

    def slot(self, index: int = 0) -> PlacementGroupSchedulingStrategy:
        """The scheduling strategy of one of the actors."""
        return PlacementGroupSchedulingStrategy(self._group, index)

    def granted(self) -> bool:
        """Whether the cluster has made the room."""
        return placement_group_table(self._group)["state"] == "CREATED"

    def give_back(self) -> None:
        """Ends whatever still runs there."""
        remove_placement_group(self._group)

    def missing(self, actors: str, waited: str) -> ConfigError:
        """What to tell people after a deadline. actors: e.g. "rollout-0 and rollout-1"; waited: how long, and the
        setting that says so."""
        each = " and ".join(map(_amounts, [self.each, *self.beside]))
        return ConfigError(
            f"the cluster has no room: {actors}, {each} each, waited {waited}. The cluster has "
            f"{_amounts(ray.cluster_resources())}, of which {_amounts(ray.available_resources())} are free and perhaps "
            "on several nodes. End what holds the rest (`ray status`), lower the cpus, gpus, custom or number of these "
            "actors, or add nodes"
        )


def _bundle(resources: Mapping[str, float]) -> dict[str, float]:
    # A bundle may not be empty, and an actor may ask for nothing.
    return {kind: amount for kind, amount in resources.items() if amount} or {"CPU": 0.001}


def options(resources: Resources) -> dict[str, Any]:
    """What Ray is told of an actor that is given these. One without GPUs sees none: Ray hides only those of others."""
    hidden = {} if resources.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "resources": resources.custom,
        "runtime_env": {"env_vars": thread_env(resources.cpus) | hidden | {DRIVER_HAS: json.dumps(engines())}},
    }


def _amounts(resources: Mapping[str, float]) -> str:
    """E.g. "1.2 CPU, 3 GPU", less what every node has."""
    shown = {kind: n for kind, n in resources.items() if n and not kind.startswith(("node:", "memory", "object_store"))}
    # A placement group's own share is listed a second time under its name.
    return ", ".join(f"{n:g} {kind}" for kind, n in sorted(shown.items()) if "_group_" not in kind) or "nothing"


def node_name() -> str:
    """This process's node, as Ray's dashboard lists it."""
    return f"{ray.util.get_node_ip_address()} ({socket.gethostname()})"


def building(init: Callable[P, None]) -> Callable[P, None]:
    """An actor's `__init__` that raises ConfigError, with the name of the node, also for a missing file, which other
    nodes may well have, and for another release of torch or vLLM than the driver's."""

    @wraps(init)
    def named(*args: P.args, **options: P.kwargs) -> None:
        gc.disable()  # what is imported and built here stays, and would be searched for garbage again and again
        try:
            check_engines()
            init(*args, **options)
        except (ConfigError, FileNotFoundError) as error:
            raise ConfigError(f"on node {node_name()}: {error}") from error
        finally:
            gc.enable()

    return named


def last_line(error: BaseException) -> str:
    """The line of an error of Ray's that says what happened; before it comes the actor's traceback."""
    return str(error).strip().splitlines()[-1]


def not_built(error: RayError) -> ConfigError | None:
    """The ConfigError that an actor's `__init__` ended with, which Ray keeps as text; None if it was another error."""
    kind, _, text = last_line(error).partition(": ")
    wrong = isinstance(error, RayActorError) and error.actor_init_failed
    return ConfigError(text) if wrong and kind == f"{ConfigError.__module__}.{ConfigError.__name__}" else None
