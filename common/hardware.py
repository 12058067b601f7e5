"""What this machine's processor can do, without torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# x86: flags; ARM: Features.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bf16 itself; elsewhere torch emulates it, slower than fp32."""
    if not CPUINFO.is_file():
        return False
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return any(key.strip() in ("flags", "Features") and BFLOAT16_FLAGS & set(value.split()) for key, _, value in lines)
