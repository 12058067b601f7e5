"""Process set-up that must happen before torch, vLLM or DeepSpeed are imported."""

from __future__ import annotations

import os
import socket

from common.config import ConfigError


def thread_env(cpus: float) -> dict[str, str]:
    """Environment of an actor that was given `cpus` CPUs: as many math threads, at least one.

    Set before the process imports torch; several processes that spin on the same cores slow each other tenfold.
    """
    threads = str(max(1, int(cpus)))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "NUMEXPR_MAX_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }


def free_port() -> int:
    """A TCP port that is free now. ConfigError if the machine has none left."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"no free TCP port on this machine ({error}); end programs that hold ports, or widen "
            "net.ipv4.ip_local_port_range"
        ) from error
