"""A reading: what somebody takes a prompt to ask for, rightly or wrongly, and scenes that fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.shapes.scene import Item, Scene
from common.shapes.vocab import CELLS, COLORS, NUMBERS, plural, riddles_in

_WORDS = {value: word for word, value in NUMBERS.items()}
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {  # relation -> (cell of the subject, cell of its reference)
    "left of": (("top left", "top right"), ("bottom left", "bottom right")),
    "right of": (("top right", "top left"), ("bottom right", "bottom left")),
    "above": (("top left", "bottom left"), ("top right", "bottom right")),
    "below": (("bottom left", "top left"), ("bottom right", "top right")),
}


@dataclass(frozen=True)
class Want:
    """So many objects of one shape, in one color or, with None, in any."""

    count: int
    shape: str
    color: str | None = None

    def words(self) -> str:
        """E.g. "a red circle" or "three circles"."""
        number = "a" if self.count == 1 else _WORDS[self.count]
        shape = self.shape if self.count == 1 else plural(self.shape)
        return " ".join(word for word in (number, self.color, shape) if word)


@dataclass(frozen=True)
class Reading:
    """Objects wanted, the relation of the second to the first if any, and the inferences that led there."""

    wants: tuple[Want, ...]
    relation: str | None = None
    facts: tuple[str, ...] = ()

    def sentences(self) -> str:
        """The inferences, or the request in short where there are none; every sentence ends in a dot."""
        if self.facts:
            return " ".join(f"{fact}." for fact in self.facts)
        words = [want.words() for want in self.wants]
        if self.relation:
            return f"{words[1]} {self.relation} {words[0]}."
        return " and ".join(words) + "."


def read(record: Mapping[str, Any]) -> Reading:
    """The right reading of a prompt record (`include`, and `prompt` for its riddles)."""
    include = record["include"]
    wants = tuple(Want(entry["count"], entry["class"], entry.get("color")) for entry in include)
    positions = [entry["position"][0] for entry in include if "position" in entry]
    facts = tuple(riddle.solved() for riddle in riddles_in(record.get("prompt", "")))
    return Reading(wants, positions[0] if positions else None, facts)


def draw_scene(reading: Reading, rng: np.random.Generator) -> Scene:
    """A scene that fits a reading, what it leaves open drawn uniformly; a related pair shares a row or column."""
    if reading.relation:
        subject, reference = _PAIRS[reading.relation][rng.integers(2)]
        spare = [cell for cell in CELLS if cell not in (subject, reference)]
        cells = [reference, subject, *rng.permutation(spare).tolist()]
    else:
        cells = rng.permutation(list(CELLS)).tolist()
    wanted = [want for want in reading.wants for _ in range(want.count)]
    items = [
        Item(want.color or str(rng.choice(list(COLORS))), want.shape, cell)
        for want, cell in zip(wanted, cells, strict=False)
    ]
    return Scene(tuple(sorted(items, key=lambda item: list(CELLS).index(item.cell))))
