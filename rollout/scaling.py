"""How many replicas a pool should have, and which of them go first."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rollout.replica import Replica


def wanted(staying: Sequence[Replica], queued: int, bounds: tuple[int, int], idle_s: float) -> int:
    """Within the bounds, one more for each piece of queued work that no replica is coming for, or one less while a
    replica has had none for idle_s seconds."""
    coming = sum(not replica.serving for replica in staying)
    number = len(staying) + max(0, queued - coming)
    idle = [replica.idle_since for replica in staying if replica.serving and replica.call is None]
    if idle and time.monotonic() - min(idle) > idle_s:
        number -= 1
    fewest, most = bounds
    return max(fewest, min(number, most))


def first_to_go(staying: Sequence[Replica]) -> list[Replica]:
    """Those that have nothing to finish come first."""
    return sorted(staying, key=lambda replica: (replica.serving, replica.call is not None))
