"""What people want to see of chains, told by a task where groups are or can be brought.

Apart from its caller, since the task's process imports this file: without torch it answers seconds earlier.
"""

from __future__ import annotations

from typing import Any

import ray

from common.records import encode_png
from common.shapes.reasoning import reasoning_correct
from common.shapes.score import is_scene
from common.types import Group


@ray.remote(num_cpus=0)
def describe(groups: list[ray.ObjectRef], pictured: list[bool]) -> list[list[dict[str, Any]]]:
    """What people want to see of the groups' chains. One task reads them one by one: no image reaches the driver
    unasked, and no two of them are in memory together."""
    return [_about(ray.get(ref), pictures) for ref, pictures in zip(groups, pictured, strict=True)]


def _about(group: Group, pictures: bool) -> list[dict[str, Any]]:
    metadata = group.prompt.metadata
    judged = is_scene(metadata)
    return [
        {
            "reasoning": chain.text.text,
            "reasoning_correct": reasoning_correct(metadata, chain.text.text)
            if judged and len(chain.text.ids)
            else None,
            "png": encode_png(chain.image.pixels) if pictures else b"",
        }
        for chain in group.chains
    ]
