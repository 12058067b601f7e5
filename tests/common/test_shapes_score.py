"""GenEval's rules, case by case."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.shapes.detect import Detection
from common.shapes.score import exam, is_scene, partial, points, relations, strict, text_alignment, validate_metadata
from common.shapes.vocab import COLORS, SHAPES


def _at(x: float, y: float, shape: str = "circle", color: str = "red", radius: float = 6) -> Detection:
    return Detection(shape, color, (x - radius, y - radius, x + radius, y + radius), 1.0)


def _metadata(*include: dict[str, Any], exclude: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"tag": "counting", "include": list(include), "exclude": exclude or []}


def test_count_is_a_lower_bound_and_exclude_an_upper_one() -> None:
    found = [_at(8, 8), _at(24, 8)]
    assert strict(_metadata({"class": "circle", "count": 2}), found)
    assert strict(_metadata({"class": "circle", "count": 1}), found)
    assert not strict(_metadata({"class": "circle", "count": 3}), found)
    assert not strict(_metadata({"class": "circle", "count": 1}, exclude=[{"class": "circle", "count": 2}]), found)
    assert strict(_metadata({"class": "circle", "count": 1}, exclude=[{"class": "circle", "count": 3}]), found)


def test_objects_not_asked_for_matter_only_when_excluded() -> None:
    found = [_at(8, 8), _at(24, 8, "unknown")]
    want = {"class": "circle", "count": 1}
    assert strict(_metadata(want), found)
    assert strict(_metadata(want, exclude=[{"class": "square", "count": 1}]), found)
    assert not strict(_metadata(want, exclude=[{"class": "object", "count": 2}]), found)


def test_object_matches_any_shape() -> None:
    want = _metadata({"class": "object", "count": 1, "color": "red"})
    assert strict(want, [_at(8, 8, "unknown")])
    assert not strict(want, [_at(8, 8, "ring", "blue")])


def test_color_needs_count_objects_of_that_color() -> None:
    want = _metadata({"class": "circle", "count": 2, "color": "red"})
    assert strict(want, [_at(8, 8), _at(24, 8), _at(8, 24, color="blue")])
    assert not strict(want, [_at(8, 8), _at(24, 8, color="blue")])


def test_no_objects() -> None:
    want = _metadata({"class": "circle", "count": 1})
    assert not strict(want, [])
    assert partial(want, []) == 0


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (16, 0, {"right of"}),
        (-16, 0, {"left of"}),
        (0, 16, {"below"}),
        (0, -16, {"above"}),
        (-16, -16, {"left of", "above"}),
        (16, 2, {"right of"}),
        (0, 0, set()),
        (2.4, 0, set()),  # the dead zone: 0.1 * (12 + 12)
        (4.8, 0, set()),  # cleared by half of its offset, exactly at the limit
        (4.81, 0, {"right of"}),
        (2.3, 2.3, set()),
        (8, 8, set()),  # (8 - 2.4) / |offset| = 0.495
        (8.3, 8.3, {"right of", "below"}),  # 0.503
        (20, 11, {"right of"}),
    ],
)
def test_relations(dx: float, dy: float, expected: set[str]) -> None:
    assert relations(_at(50 + dx, 50 + dy), _at(50, 50)) == expected


def test_the_dead_zone_grows_with_the_boxes() -> None:
    assert relations(_at(16, 0, radius=2), _at(0, 0, radius=2)) == {"right of"}
    assert relations(_at(16, 0, radius=30), _at(0, 0, radius=30)) == set()


def test_position_holds_for_any_pair() -> None:
    want = _metadata({"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]})
    square = _at(8, 8, "square")
    assert strict(want, [square, _at(-8, 8)])
    assert not strict(want, [square, _at(24, 8)])
    assert strict(want, [square, _at(24, 8), _at(-8, 8)])


def test_position_looks_only_at_objects_of_the_color() -> None:
    want = _metadata(
        {"class": "square", "count": 1}, {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]}
    )
    square = _at(24, 8, "square")
    assert not strict(want, [square, _at(8, 8, color="blue"), _at(40, 8, color="red")])
    assert strict(want, [square, _at(8, 8, color="red"), _at(40, 8, color="blue")])


def test_points_name_what_failed() -> None:
    want = _metadata(
        {"class": "square", "count": 1},
        {"class": "circle", "count": 2, "color": "red", "position": ["above", 0]},
        exclude=[{"class": "object", "count": 4}],
    )
    assert points(want, [_at(8, 24, "square"), _at(8, 8), _at(24, 8, color="blue")]) == {
        "0: square present": True,
        "0: 1 square": True,
        "1: circle present": True,
        "1: 2 circle": True,
        "1: circle is red": False,
        "1: above 0": True,
        "fewer than 4 object": True,
    }


def test_partial_rises_step_by_step() -> None:
    want = _metadata({"class": "circle", "count": 3, "color": "red"}, exclude=[{"class": "object", "count": 4}])
    right = [_at(8, 8), _at(24, 8), _at(8, 24)]
    ladder = [[], right[:1], right[:2], [*right[:2], _at(8, 24, color="blue")], right]
    values = [partial(want, found) for found in ladder]
    assert values == sorted(set(values))
    assert values[-1] == 1
    surplus = [partial(want, right + right[:extra]) for extra in range(4)]
    assert surplus == sorted(set(surplus), reverse=True)


def test_partial_rises_as_the_object_moves_to_its_side() -> None:
    want = _metadata({"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]})
    values = [partial(want, [_at(50, 50, "square"), _at(50 - dx, 66)]) for dx in (-16, 4, 8, 10, 16)]
    assert values == sorted(set(values))
    assert values[-1] == 1


_SQUARE, _RED_LEFT = {"class": "square", "count": 1}, {"color": "red", "position": ["left of", 0]}


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([_at(24, 8, "square"), _at(8, 8)], set()),
        # A color that is wrong costs its own question, not also the relation's.
        ([_at(24, 8, "square"), _at(8, 8, color="blue")], {"1: circle is red"}),
        ([_at(8, 8, "square"), _at(24, 8)], {"1: left of 0"}),
        ([_at(24, 8, "square"), _at(8, 8), _at(8, 24)], {"1: exactly 1 circle"}),
        # What the prompt does not name is not asked about.
        ([_at(24, 8, "square"), _at(8, 8), _at(8, 24, "ring")], set()),
        ([_at(24, 8, "square")], {"1: circle present", "1: exactly 1 circle", "1: circle is red", "1: left of 0"}),
        ([_at(8, 8)], {"0: square present", "0: exactly 1 square", "1: left of 0"}),
    ],
)
def test_exam_questions_stand_for_themselves(found: list[Detection], wrong: set[str]) -> None:
    want = _metadata(_SQUARE, {"class": "circle", "count": 1, **_RED_LEFT}, exclude=[{"class": "object", "count": 3}])
    answers = exam(want, found)
    assert {name for name, yes in answers.items() if not yes} == wrong
    assert text_alignment(want, found) == pytest.approx(1 - len(wrong) / 6)


def test_exam_counts_exactly() -> None:
    want = _metadata({"class": "circle", "count": 2, "color": "red"})
    assert [text_alignment(want, [_at(8, 8)] * n) for n in range(4)] == pytest.approx([0, 1 / 3, 1, 2 / 3])


_circles = _metadata(*({"class": "circle", "count": 1, "color": color} for color in ("red", "blue")))


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([_at(8, 8), _at(8, 24, color="blue")], set()),
        ([_at(8, 8)], {"0: exactly 2 circle", "1: exactly 2 circle", "1: circle is blue"}),
        ([_at(8, 8), _at(8, 24, color="blue"), _at(24, 8)], {"0: exactly 2 circle", "1: exactly 2 circle"}),
    ],
)
def test_entries_of_one_class_are_counted_together(found: list[Detection], wrong: set[str]) -> None:
    assert {name for name, yes in exam(_circles, found).items() if not yes} == wrong


def test_an_object_beside_a_named_class_may_be_of_it() -> None:
    want = _metadata({"class": "circle", "count": 1}, {"class": "object", "count": 1})
    pictures = [[_at(8, 8), _at(8, 24, shape)] for shape in ("circle", "square")]
    assert [text_alignment(want, found) for found in pictures] == [1, 1]
    assert text_alignment(want, [_at(8, 8)]) == 3 / 4  # one object of two


_found = st.lists(
    st.builds(
        _at, st.floats(0, 32), st.floats(0, 32), st.sampled_from((*SHAPES, "unknown")), st.sampled_from(list(COLORS))
    ),
    max_size=5,
)


@given(_found)
def test_partial_is_one_exactly_when_strict(found: list[Detection]) -> None:
    for want in (
        _metadata({"class": "object", "count": 2}, exclude=[{"class": "object", "count": 3}]),
        _metadata({"class": "object", "count": 1}, {"class": "object", "count": 1, "position": ["left of", 0]}),
        _metadata({"class": "circle", "count": 1, "color": "red"}, exclude=[{"class": "ring", "count": 1}]),
    ):
        assert 0 <= partial(want, found) <= 1
        assert (partial(want, found) == 1) == strict(want, found) == all(points(want, found).values())


_GOOD = {"class": "circle", "count": 1}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("red circle", "metadata is 'red circle'; give a dict"),
        ({"include": [_GOOD]}, "tag is None; use one of single_object"),
        ({"tag": "colours", "include": [_GOOD]}, "tag is 'colours'"),
        (_metadata(), r"include is \[\]; give a list"),
        ({"tag": "colors", "include": _GOOD}, "include is {.*; give a list"),
        ({"tag": "colors", "include": [_GOOD], "exclude": None}, "exclude is None"),
        (_metadata(_GOOD, {"class": "blob", "count": 1}), r"include\[1\].class is 'blob'; use one of circle"),
        (_metadata({"class": "circle", "count": 0}), r"include\[0\].count is 0"),
        (_metadata({"class": "circle", "count": True}), r"include\[0\].count is True"),
        (_metadata({"class": "circle", "count": "2"}), r"include\[0\].count is '2'"),
        (_metadata({**_GOOD, "color": "pink"}), r"include\[0\].color is 'pink'; use one of red"),
        (_metadata({**_GOOD, "colour": "red"}), r"include\[0\] has the keys \['colour'\]"),
        (_metadata({**_GOOD, "position": "left of"}), r"include\[0\].position is 'left of'"),
        (_metadata(_GOOD, {**_GOOD, "position": ["beside", 0]}), r"include\[1\].position has the relation 'beside'"),
        (_metadata(_GOOD, {**_GOOD, "position": ["above", 1]}), r"include\[1\].position has the index 1"),
        (_metadata(_GOOD, exclude=[{**_GOOD, "color": "red"}]), r"exclude\[0\] has the keys \['color'\]"),
        (_metadata("circle"), r"include\[0\] is 'circle'"),  # type: ignore[arg-type]
    ],
)
def test_bad_metadata_is_refused_by_name(metadata: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_metadata(metadata)


def test_prompts_of_geneval_are_no_scenes_of_this_task() -> None:
    """They have its tags, but their reasoning cannot be judged."""
    assert is_scene({"tag": "counting", "include": [{"class": "circle", "count": 2}]})
    assert not is_scene({"tag": "counting", "include": [{"class": "dog", "count": 2}]})
    assert not is_scene({"tag": "counting"})
