"""What the tests of several rooms share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from suite_order import Together, place

if TYPE_CHECKING:
    from common.bagel.checkpoint import Checkpoint

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before ray is
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray on loopback only, likewise
# How long an example takes is the machine's load, and no property of the code.
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs on this machine, for the whole session."""
    import ray

    from deploy.local_ray import start_ray

    start_ray(2, object_store_memory=256 << 20, log_to_driver=True, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def golden_checkpoint() -> Checkpoint:
    """The recorded checkpoint, for tests that leave it as it is."""
    from golden_numbers import CHECKPOINT

    from common.bagel import checkpoint

    return checkpoint.load(CHECKPOINT)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of random models: language models `qwen2` and `llama`, pipelines `sd3`, `flux` and `qwen_image`."""
    import tiny_models

    root = tmp_path_factory.mktemp("models")
    for kind in ("qwen2", "llama"):
        tiny_models.make_reasoner(root / kind, kind)
    for family in tiny_models.FAMILIES:
        tiny_models.make_pipeline(root / family, family)
    return root


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone, with DeepSpeed on it; taken down again, as vLLM makes one of its own."""
    from common.runtime import free_port
    from learner.engine import init_process_group

    before = dict(os.environ)
    init_process_group(0, 1, f"127.0.0.1:{free_port()}", 60)
    yield
    import deepspeed

    deepspeed.comm.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
