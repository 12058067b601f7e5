"""GenEval's correctness rules, on the boxes of a detector.

A prompt's metadata lists what the image must include and exclude::

    {"tag": "position",
     "include": [{"class": "square", "count": 1},
                 {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "object", "count": 3}]}

The class "object" matches every blob, also one of unknown shape. `position` names a relation and the index
of the earlier include entry it refers to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.shapes.detect import Detection
from common.shapes.vocab import ANY, COLORS, RELATIONS, SHAPES, TAGS

Metadata = Mapping[str, Any]

DEAD_ZONE = 0.1  # of the sum of the two boxes' sizes, on each axis
DIRECTION = 0.5  # how far the direction must point along an axis
_NEAR_MISS = 0.5  # the most credit for a relation that does not hold


def _along(a: Detection, b: Detection) -> dict[str, float]:
    """How far `a` lies from `b` along each relation's direction: -1 to 1 each."""
    boxes = np.array([a.box, b.box]).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    length = float(np.hypot(*offset))
    if length == 0:
        return dict.fromkeys(RELATIONS, 0.0)
    cleared = np.maximum(np.abs(offset) - DEAD_ZONE * sizes.sum(0), 0) * np.sign(offset) / length
    dx, dy = float(cleared[0]), float(cleared[1])
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}


def relations(a: Detection, b: Detection) -> set[str]:
    """The relations that `a` has to `b`; diagonal neighbours may have two, overlapping ones none."""
    return {name for name, value in _along(a, b).items() if value > DIRECTION}


def _relation_credit(relation: str, group: Sequence[Detection], targets: Sequence[Detection]) -> float:
    best = max((_along(a, b)[relation] for a in group for b in targets), default=0.0)
    return 1.0 if best > DIRECTION else _NEAR_MISS * max(best, 0.0) / DIRECTION


def _of_class(entry: Mapping[str, Any], detections: Sequence[Detection]) -> list[Detection]:
    return [d for d in detections if entry["class"] in (ANY, d.shape)]


def _credits(metadata: Metadata, detections: Sequence[Detection]) -> dict[str, float]:
    """The exam: every question's credit, 1 exactly where the answer is yes."""
    credit: dict[str, float] = {}
    groups: list[list[Detection]] = []
    for index, entry in enumerate(metadata["include"]):
        name, count, color = entry["class"], entry["count"], entry.get("color")
        found = _of_class(entry, detections)
        credit[f"{index}: {name} present"] = float(bool(found))
        credit[f"{index}: {count} {name}"] = min(len(found), count) / count
        if color is not None:
            found = [d for d in found if d.color == color]
            credit[f"{index}: {name} is {color}"] = min(len(found), count) / count
        if entry.get("position") is not None:
            relation, target = entry["position"]
            credit[f"{index}: {relation} {target}"] = _relation_credit(relation, found, groups[target])
        groups.append(found)
    for entry in metadata.get("exclude") or ():
        surplus = max(len(_of_class(entry, detections)) - entry["count"] + 1, 0)
        credit[f"fewer than {entry['count']} {entry['class']}"] = 1 / (1 + surplus)
    return credit


def points(metadata: Metadata, detections: Sequence[Detection]) -> dict[str, bool]:
    """Yes/no exam points by name: each object present, its count, color and relation right, nothing extra."""
    return {name: value == 1 for name, value in _credits(metadata, detections).items()}


def strict(metadata: Metadata, detections: Sequence[Detection]) -> bool:
    """GenEval's verdict: every point holds.

    As in GenEval more objects than asked for fail only an `exclude` entry. Unlike GenEval, which looks at
    the most confident `count` objects only, any object of the class may serve a color or a relation.
    """
    return all(points(metadata, detections).values())


def partial(metadata: Metadata, detections: Sequence[Detection]) -> float:
    """The mean credit over the exam points, in [0, 1]: a near miss earns a part, 1 exactly when strict."""
    credit = _credits(metadata, detections)
    return sum(credit.values()) / len(credit)


def exam(metadata: Metadata, detections: Sequence[Detection]) -> dict[str, bool]:
    """Yes/no questions on what the prompt asks for, by name, each for itself (the paper's TA protocol): the object is
    there; there are exactly as many as all entries ask for; so many have the color; one stands in the relation,
    whatever the colors.

    Unlike `points` nothing asks about objects that the prompt does not name.
    """
    include = metadata["include"]
    answers: dict[str, bool] = {}
    for index, entry in enumerate(include):
        name, count, color, found = entry["class"], entry["count"], entry.get("color"), _of_class(entry, detections)
        answers[f"{index}: {name} present"] = bool(found)
        fewest, most = asked_for(include, name)
        wanted = f"exactly {fewest}" if fewest == most else f"{fewest} to {most}"
        answers[f"{index}: {wanted} {name}"] = fewest <= len(found) <= most
        if color is not None:
            answers[f"{index}: {name} is {color}"] = sum(d.color == color for d in found) >= count
        if entry.get("position") is not None:
            relation, target = entry["position"]
            pairs = ((a, b) for a in found for b in _of_class(include[target], detections))
            answers[f"{index}: {relation} {target}"] = any(relation in relations(a, b) for a, b in pairs)
    return answers


def asked_for(include: Sequence[Mapping[str, Any]], name: str) -> tuple[int, int]:
    """The fewest and the most objects of a class that entries ask for together: a red circle and a blue circle are
    two, and the "object" beside a circle may be a second one."""
    alike = sum(entry["count"] for entry in include if name in (ANY, entry["class"]))
    return alike, alike + sum(entry["count"] for entry in include if name != ANY == entry["class"])


def text_alignment(metadata: Metadata, detections: Sequence[Detection]) -> float:
    """One image's TA-like score: the share of `exam` questions answered yes, in [0, 1]."""
    answers = exam(metadata, detections)
    return sum(answers.values()) / len(answers)


def _check_entry(entry: object, where: str, index: int, keys: set[str]) -> None:
    if type(entry) is not dict:
        raise ValueError(f"{where} is {entry!r}; give a dict with the keys {sorted(keys)}")
    if extra := set(entry) - keys:
        raise ValueError(f"{where} has the keys {sorted(map(str, extra))}; keep to {sorted(keys)}")
    if entry.get("class") not in (*SHAPES, ANY):
        raise ValueError(f"{where}.class is {entry.get('class')!r}; use one of {', '.join((*SHAPES, ANY))}")
    count = entry.get("count")
    if type(count) is not int or count < 1:
        raise ValueError(f"{where}.count is {count!r}; give a whole number of 1 or more")
    color = entry.get("color")
    if color is not None and color not in tuple(COLORS):
        raise ValueError(f"{where}.color is {color!r}; use one of {', '.join(COLORS)} or leave it out")
    position = entry.get("position")
    if position is None:
        return
    if type(position) is not list or len(position) != 2:
        raise ValueError(f"{where}.position is {position!r}; give [relation, index of an earlier include entry]")
    if position[0] not in RELATIONS:
        raise ValueError(f"{where}.position has the relation {position[0]!r}; use one of {', '.join(RELATIONS)}")
    if type(position[1]) is not int or not 0 <= position[1] < index:
        raise ValueError(f"{where}.position has the index {position[1]!r}; point at an include entry before {index}")


def is_scene(metadata: object) -> bool:
    """Whether a prompt asks for what the shapes task can draw: GenEval's prompts have the same fields and tags."""
    try:
        validate_metadata(metadata)
    except ValueError:
        return False
    return True


def validate_metadata(metadata: object) -> None:
    """Check one prompt's metadata; ValueError names the first field that is wrong, its value and the remedy."""
    if type(metadata) is not dict:
        raise ValueError(f"metadata is {metadata!r}; give a dict with tag, include and exclude")
    if metadata.get("tag") not in TAGS:
        raise ValueError(f"tag is {metadata.get('tag')!r}; use one of {', '.join(TAGS)}")
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    if type(include) is not list or not include:
        raise ValueError(f"include is {include!r}; give a list of at least one entry")
    if type(exclude) is not list:
        raise ValueError(f"exclude is {exclude!r}; give a list, empty if nothing is excluded")
    for index, entry in enumerate(include):
        _check_entry(entry, f"include[{index}]", index, {"class", "count", "color", "position"})
    for index, entry in enumerate(exclude):
        _check_entry(entry, f"exclude[{index}]", index, {"class", "count"})
