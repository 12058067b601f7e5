"""The words of the shapes task: what can be drawn, where, and the riddles that stand for those words."""

from __future__ import annotations

from dataclasses import dataclass

SIZE = 32
CELL = 16
BACKGROUND: tuple[int, int, int] = (128, 128, 128)

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
# Every color lies far from the background and from the straight line between the background and any other
# color, so that a half-covered edge pixel is never taken for a third color.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (20, 180, 40),
    "blue": (25, 50, 230),
    "yellow": (245, 225, 30),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
}
CELLS: dict[str, tuple[int, int]] = {  # name -> centre (x, y) in px
    "top left": (8, 8),
    "top right": (24, 8),
    "bottom left": (8, 24),
    "bottom right": (24, 24),
}
NUMBERS: dict[str, int] = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TAGS: tuple[str, ...] = (
    "single_object", "two_object", "counting", "colors", "position", "color_attr", "reasoning",
)  # fmt: skip
ANY = "object"  # the class that every blob belongs to
UNKNOWN = "unknown"  # the shape of a blob that looks like none of SHAPES


@dataclass(frozen=True)
class Riddle:
    """A phrase that stands for one word.

    `kind` is "number", "color", "shape" or "relation"; `phrase` is what the prompt says; `fact` is the
    inference that solves it, with `{}` where the answer goes; `answer` is the word meant.
    """

    kind: str
    phrase: str
    fact: str
    answer: str

    def solved(self, answer: str | None = None) -> str:
        """The inference stated with `answer` (the right one by default), e.g. "fresh snow is white"."""
        return self.fact.format(self.answer if answer is None else answer)


ANSWERS: dict[str, tuple[str, ...]] = {  # riddle kind -> all answers it can have
    "number": tuple(NUMBERS), "color": tuple(COLORS), "shape": SHAPES, "relation": RELATIONS,
}  # fmt: skip

_COLOR_THINGS = {
    "red": ("a ripe tomato", "a fire truck", "a stop sign", "a ripe strawberry"),
    "green": ("fresh grass", "a frog", "an emerald", "a leaf in spring"),
    "blue": ("a clear sky", "a sapphire", "the deep sea", "a blueberry"),
    "yellow": ("a ripe banana", "a lemon", "a sunflower", "a baby chick"),
    "white": ("fresh snow", "milk", "a polar bear", "cotton"),
    "black": ("coal", "a raven", "a starless night", "a car tire"),
}
_SHAPE_THINGS = {
    "circle": ("a wheel", "a coin", "the full moon"),
    "square": ("a chess board", "a sticky note", "the side of a dice"),
    "triangle": ("a slice of pizza", "a pyramid seen from the side", "the roof of a house"),
    "cross": ("a plus sign", "a first aid sign", "the mark on the swiss flag"),
    "ring": ("a donut", "a hula hoop", "a life buoy"),
}
_NUMBER_PHRASES = {
    "one": (
        ("one less than two", "one less than two is {}"),
        ("two less than three", "two less than three is {}"),
        ("as many as the earth has moons", "the number of moons is {}"),
        ("as many as a unicorn has horns", "the number of horns is {}"),
    ),
    "two": (
        ("one more than one", "one more than one is {}"),
        ("three less than five", "three less than five is {}"),
        ("as many as a person has eyes", "a person has {} eyes"),
        ("as many as a bicycle has wheels", "a bicycle has {} wheels"),
    ),
    "three": (
        ("two more than one", "two more than one is {}"),
        ("half of six", "half of six is {}"),
        ("as many as a triangle has sides", "a triangle has {} sides"),
        ("as many as a traffic light has lamps", "a traffic light has {} lamps"),
    ),
    "four": (
        ("one less than five", "one less than five is {}"),
        ("twice two", "twice two is {}"),
        ("as many as a dog has legs", "a dog has {} legs"),
        ("as many as a year has seasons", "a year has {} seasons"),
    ),
}
_RELATION_PHRASES = {
    "left of": (
        ("on the side where a map shows west of", "west on a map is {}"),
        ("on the side where a line of text begins, seen from", "the beginning of a line is {}"),
        ("on the side opposite to the right of", "opposite to the right is {}"),
    ),
    "right of": (
        ("on the side where a map shows east of", "east on a map is {}"),
        ("on the side where a line of text ends, seen from", "the end of a line is {}"),
        ("on the side opposite to the left of", "opposite to the left is {}"),
    ),
    "above": (
        ("on the side where a map shows north of", "north on a map is {}"),
        ("on the side where the sky is, seen from", "the sky is {}"),
        ("on the side opposite to the bottom of", "opposite to the bottom is {}"),
    ),
    "below": (
        ("on the side where a map shows south of", "south on a map is {}"),
        ("on the side where the ground is, seen from", "the ground is {}"),
        ("on the side opposite to the top of", "opposite to the top is {}"),
    ),
}

RIDDLES: tuple[Riddle, ...] = (
    *(Riddle("number", p, fact, a) for a, pairs in _NUMBER_PHRASES.items() for p, fact in pairs),
    *(Riddle("color", f"the color of {t}", f"{t} is {{}}", a) for a, ts in _COLOR_THINGS.items() for t in ts),
    *(Riddle("shape", f"the shape of {t}", f"{t} is a {{}}", a) for a, ts in _SHAPE_THINGS.items() for t in ts),
    *(Riddle("relation", p, fact, a) for a, pairs in _RELATION_PHRASES.items() for p, fact in pairs),
)


def riddles(kind: str) -> tuple[Riddle, ...]:
    """All riddles of one `kind`, in a fixed order."""
    return tuple(r for r in RIDDLES if r.kind == kind)


def riddles_in(prompt: str) -> tuple[Riddle, ...]:
    """The riddles whose phrases the prompt contains, in the order of the prompt."""
    return tuple(sorted((r for r in RIDDLES if r.phrase in prompt), key=lambda r: prompt.index(r.phrase)))


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")
