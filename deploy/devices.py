"""What a device can do by its maker's data sheet; `unigrpo plan` and `--gpus` know these kinds."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from common.config import ConfigError


@dataclass(frozen=True)
class Device:
    """One accelerator: bf16 matrix rate without sparsity in TFLOP/s, memory in GB and its bandwidth in GB/s, bandwidth
    to other devices in GB/s (one direction: NVLink, else PCIe), host seconds of one decoding step of the reasoner."""

    tflops: float
    memory_gb: float
    bandwidth_gbs: float
    link_gbs: float
    decode_s: float = 0.005


# tflops, memory and bandwidth: NVIDIA's and AMD's data sheets of the SXM/OAM or, where there is none, the PCIe card.
# Sheets that state a rate with sparsity are halved. decode_s is an assumption, not from a sheet.
DEVICES = {
    "A100-40GB": Device(312, 40, 1555, 300),
    "A100-80GB": Device(312, 80, 2039, 300),
    "H20-96GB": Device(148, 96, 4000, 450),
    "H100-80GB": Device(989, 80, 3350, 450),
    "H200-141GB": Device(989, 141, 4800, 450),
    "B200-180GB": Device(2250, 180, 8000, 900),
    "L40S-48GB": Device(362, 48, 864, 32),
    "MI300X-192GB": Device(1307, 192, 5300, 64),
}


@dataclass(frozen=True)
class Fleet:
    """`count` devices of one kind."""

    count: int
    kind: str
    device: Device


def parse_gpus(text: str) -> Fleet:
    """ "8xH100-80GB" -> eight of that kind. ConfigError for another form or an unknown kind."""
    match = re.fullmatch(r"(\d+)x(.+)", text)
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"--gpus {text} is not COUNTxKIND, e.g. 8xH100-80GB")
    kind = {name.lower(): name for name in DEVICES}.get(match[2].lower())
    if kind is None:
        close = difflib.get_close_matches(match[2], DEVICES, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"--gpus {text}: {match[2]} is not known; {hint}known kinds: {', '.join(DEVICES)}")
    return Fleet(int(match[1]), kind, DEVICES[kind])
