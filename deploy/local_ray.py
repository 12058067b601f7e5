"""Ray on this machine alone."""

from __future__ import annotations

import logging
from typing import Any

import ray

from common.config import ConfigError

TRIES = 3


def start_ray(cpus: int, **options: Any) -> None:
    """`ray.init`, with these options, of a cluster of `cpus` CPUs that ends with this process.

    ConfigError if its processes do not come up: Ray gives them half a minute, which a machine that is busy with other
    programs may not have for them, so that it is tried again.
    """
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    for left in reversed(range(TRIES)):
        try:
            ray.init(address="local", num_cpus=cpus, **{**quiet, **options})
            return
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error):
                raise
            if not left:
                raise ConfigError(
                    f"Ray did not come up on this machine within half a minute, {TRIES} times; end programs that keep "
                    "its CPUs busy, or try again later"
                ) from error
