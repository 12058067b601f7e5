"""Everything the shapes prompts can ask for, tag by tag."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import Any

from common.shapes.vocab import ANY, COLORS, NUMBERS, OPPOSITE, RELATIONS, SHAPES, plural, riddles

Entry = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One thing to ask for.

    `combination` holds the attributes that train and held-out must not share; `body` is the prompt without
    its opening words; `include` is GenEval's; `kind` is the tag or, for riddles, which kinds they are;
    `phrases` are the riddle phrases in the body.
    """

    kind: str
    combination: tuple[str, ...]
    body: str
    include: tuple[Entry, ...]
    phrases: tuple[str, ...] = ()
    exact: bool = False  # the number of objects is the point, as in counting

    def exclude(self) -> list[Entry]:
        """GenEval's exclude entries; the one on any object makes every surplus blob a fault."""
        total = sum(entry["count"] for entry in self.include)
        surplus = [{"class": ANY, "count": total + 1}]
        return [{"class": self.include[0]["class"], "count": total + 1}, *surplus] if self.exact else surplus


def _entry(shape: str, color: str | None = None, count: int = 1, relation: str | None = None) -> Entry:
    entry: Entry = {"class": shape, "count": count}
    if color:
        entry["color"] = color
    if relation:
        entry["position"] = [relation, 0]
    return entry


def _single() -> Iterator[Request]:
    for shape in SHAPES:
        yield Request("single_object", (shape,), f"a {shape}", (_entry(shape),))


def _two() -> Iterator[Request]:
    for pair in combinations(SHAPES, 2):
        for a, b in permutations(pair):
            yield Request("two_object", pair, f"a {a} and a {b}", (_entry(a), _entry(b)))


def _counting() -> Iterator[Request]:
    for number, color, shape in product(("two", "three", "four"), (None, *COLORS), SHAPES):
        words = f"{number} {color} {plural(shape)}" if color else f"{number} {plural(shape)}"
        include = (_entry(shape, color, NUMBERS[number]),)
        yield Request("counting", (number, color or "any", shape), words, include, exact=True)


def _colors() -> Iterator[Request]:
    for color, shape in product(COLORS, SHAPES):
        yield Request("colors", (color, shape), f"a {color} {shape}", (_entry(shape, color),))


def _position(rng: random.Random) -> Iterator[Request]:
    for relation, (a, b) in product(RELATIONS, permutations(SHAPES, 2)):
        # "a left of b" and "b right of a" are one combination, whatever the colors
        same = (relation, a, b) if relation in ("left of", "above") else (OPPOSITE[relation], b, a)
        for p, q in ((None, None), *rng.sample(list(permutations(COLORS, 2)), 2)):
            first, second = (f"{color} {shape}" if color else shape for color, shape in ((p, a), (q, b)))
            include = (_entry(b, q), _entry(a, p, relation=relation))
            yield Request("position", same, f"a {first} {relation} a {second}", include)


def _color_attr() -> Iterator[Request]:
    for (a, b), (p, q) in product(permutations(SHAPES, 2), permutations(COLORS, 2)):
        same = tuple(sorted((f"{p} {a}", f"{q} {b}")))
        yield Request("color_attr", same, f"a {p} {a} and a {q} {b}", (_entry(a, p), _entry(b, q)))


def _one_riddle(rng: random.Random) -> Iterator[Request]:
    colors = tuple(COLORS)
    for r, shape in product(riddles("color"), SHAPES):
        yield Request("color", (r.phrase, shape), f"a {shape} in {r.phrase}", (_entry(shape, r.answer),), (r.phrase,))
    for r, shape in product(riddles("number"), SHAPES):
        for color in (None, rng.choice(colors)):
            body = f"{color} {plural(shape)}, {r.phrase}" if color else f"{plural(shape)}, {r.phrase}"
            include = (_entry(shape, color, NUMBERS[r.answer]),)
            yield Request("number", (r.phrase, color or "any", shape), body, include, (r.phrase,), exact=True)
    for r, color in product(riddles("shape"), (None, *colors)):
        body = f"a {color} thing in {r.phrase}" if color else f"a thing in {r.phrase}"
        yield Request("shape", (r.phrase, color or "any"), body, (_entry(r.answer, color),), (r.phrase,))
    for r, (a, b) in product(riddles("relation"), permutations(SHAPES, 2)):
        pair = (_entry(b), _entry(a, relation=r.answer))
        yield Request("relation", (r.phrase, a, b), f"a {a} {r.phrase} a {b}", pair, (r.phrase,))


def _two_riddles(rng: random.Random) -> Iterator[Request]:
    for n, c in product(riddles("number"), riddles("color")):
        shape = rng.choice(SHAPES)
        include = (_entry(shape, c.answer, NUMBERS[n.answer]),)
        body = f"{plural(shape)}, {n.phrase}, in {c.phrase}"
        phrases = (n.phrase, c.phrase)
        yield Request("number+color", (*phrases, shape), body, include, phrases, exact=True)
    for s, c in product(riddles("shape"), riddles("color")):
        phrases = (s.phrase, c.phrase)
        body = f"a thing in {s.phrase} and in {c.phrase}"
        yield Request("shape+color", phrases, body, (_entry(s.answer, c.answer),), phrases)


def requests(rng: random.Random) -> dict[str, list[Request]]:
    """All requests by tag; `rng` picks which of the many colored and doubled variants take part."""
    return {
        "single_object": list(_single()),
        "two_object": list(_two()),
        "counting": list(_counting()),
        "colors": list(_colors()),
        "position": list(_position(rng)),
        "color_attr": list(_color_attr()),
        "reasoning": [*_one_riddle(rng), *_two_riddles(rng)],
    }
