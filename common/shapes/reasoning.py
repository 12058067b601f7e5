"""The reasoning text: inferences, then a plan of the scene.

`<think> two more than one is three. plan: red circle top left; red circle top right; ... . </think>`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common.shapes.detect import Detection
from common.shapes.reading import Reading, read
from common.shapes.scene import Item, Scene
from common.shapes.score import Metadata, strict
from common.shapes.vocab import CELLS

IDEAL_RADIUS = 6.0  # px
_PLAN = re.compile(r"\bplan\s*:([^.]*)\.")


def reason(record: Mapping[str, Any], scene: Scene, reading: Reading | None = None) -> str:
    """The reasoning that plans `scene`; its sentences state `reading`, by default the right one."""
    sentences = (reading or read(record)).sentences()
    plan = "; ".join(f"{item.color} {item.shape} {item.cell}" for item in scene.items)
    return f"<think> {sentences} plan: {plan}. </think>"


def parse_plan(text: str) -> Scene | None:
    """The scene a text plans, or None when it has not exactly one well-formed plan.

    Malformed are: no or several plans, a plan without its dot or without items, unknown words, a repeated
    cell (and so more than four items). Spaces around the punctuation and letter case do not matter.
    """
    plans = _PLAN.findall(text.lower())
    if len(plans) != 1:
        return None
    items = []
    for part in plans[0].split(";"):
        words = part.split()
        if len(words) != 4:
            return None
        try:
            items.append(Item(words[0], words[1], f"{words[2]} {words[3]}"))
        except ValueError:
            return None
    try:
        return Scene(tuple(items))
    except ValueError:
        return None


def ideal_detections(scene: Scene) -> list[Detection]:
    """What a perfect detector would find were every object centred in its cell."""

    def box(cell: str) -> tuple[float, float, float, float]:
        x, y = CELLS[cell]
        return x - IDEAL_RADIUS, y - IDEAL_RADIUS, x + IDEAL_RADIUS, y + IDEAL_RADIUS

    return [Detection(item.shape, item.color, box(item.cell), 1.0) for item in scene.items]


def reasoning_correct(metadata: Metadata, text: str) -> bool:
    """Whether the text's plan, drawn perfectly, would satisfy the prompt; False without a well-formed plan."""
    scene = parse_plan(text)
    return scene is not None and strict(metadata, ideal_detections(scene))
