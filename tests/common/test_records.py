"""Groups survive the disk to the last bit."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.records import read_groups, write_groups
from common.types import Chain, Group, ImageSegment, Prompt, TextSegment

LATENTS = ("x_t", "x_next", "v_old")


def _group(rng: np.random.Generator, name: str, chains: int, steps: int) -> Group:
    def latent() -> np.ndarray:
        return rng.standard_normal((steps, 6, 4), np.float32)

    def chain() -> Chain:
        length = int(rng.integers(1, 9))
        text = TextSegment(
            prompt_ids=rng.integers(0, 2**40, 5),
            ids=rng.integers(0, 300, length),
            logprobs=-rng.random(length, np.float32),
            finished=bool(rng.integers(2)),
            text='<think> "größer" \n</think>',
            version=int(rng.integers(9)),
        )
        image = ImageSegment(
            x_t=latent(),
            x_next=latent(),
            v_old=latent(),
            t=rng.random(steps, np.float32),
            t_next=rng.random(steps, np.float32),
            pixels=rng.integers(0, 256, (8, 12, 3), np.uint8),
            grid=(2, 3),
            version=int(rng.integers(9)),
        )
        return Chain((text, image), seed=int(rng.integers(2**62)))

    metadata = {"tag": "position", "include": [{"class": "ring", "position": ["left of", 0]}], "exclude": []}
    return Group(Prompt(name, f"draw {name}", metadata), 7, tuple(chain() for _ in range(chains)))


def _assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif hasattr(a, "__dataclass_fields__"):
        for field in fields(a):
            _assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b


def _write(path: Path, groups: list[Group], latents: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (len(groups), len(groups[0].chains))
    rewards, advantages = rng.random(shape, np.float32), rng.standard_normal(shape, np.float32)
    rewards[0, 1] = np.nan
    write_groups(path, groups, rewards, {"shapes": rewards, "clip": rewards * 2}, advantages, latents)
    return rewards, advantages


@pytest.mark.parametrize("steps", [0, 3])
def test_round_trip_with_latents_is_exact(tmp_path: Path, steps: int) -> None:
    rng = np.random.default_rng(0)
    # The same prompt twice: groups are told apart by more than their prompt.
    groups = [_group(rng, name, 5, steps) for name in ("a", "a", "b")]
    path = tmp_path / "rollouts" / "step-000007-rank0.parquet"
    rewards, advantages = _write(path, groups, latents=True)
    restored = read_groups(path)
    assert len(restored) == 3
    for (group, reward, advantage), expected, r, a in zip(restored, groups, rewards, advantages, strict=True):
        _assert_same(group, expected)
        _assert_same(reward, r)
        _assert_same(advantage, a)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_latents_the_text_and_pixels_stay_and_the_window_is_empty(tmp_path: Path) -> None:
    group = _group(np.random.default_rng(0), "a", 2, 3)
    _write(tmp_path / "x.parquet", [group], latents=False)
    ((restored, _, _),) = read_groups(tmp_path / "x.parquet")
    for chain, expected in zip(restored.chains, group.chains, strict=True):
        _assert_same(chain.text, expected.text)
        _assert_same(chain.image.pixels, expected.image.pixels)
        assert chain.seed == expected.seed
        assert all(getattr(chain.image, name).shape == (0, 6, 4) for name in LATENTS)
        assert chain.image.t.shape == chain.image.t_next.shape == (0,)


def test_columns_can_be_read_by_any_parquet_reader(tmp_path: Path) -> None:
    group = _group(np.random.default_rng(0), "a", 2, 3)
    rewards, _ = _write(tmp_path / "x.parquet", [group], latents=False)
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [(row["prompt_id"], row["chain"], row["step"]) for row in rows] == [("a", 0, 7), ("a", 1, 7)]
    assert dict(rows[0]["rewards"]) == {"shapes": rewards[0, 0], "clip": 2 * rewards[0, 0]}
    assert np.isnan(rows[1]["reward"])
    assert rows[0]["t"] == group.chains[0].image.t.tolist()
    assert rows[0]["x_t"] is None
    assert rows[0]["png"].startswith(b"\x89PNG")


def test_wrong_shapes_and_segments_are_errors_and_leave_no_file(tmp_path: Path) -> None:
    group = _group(np.random.default_rng(0), "a", 2, 3)
    path = tmp_path / "x.parquet"
    good = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"by_scorer clip has the shape \(2,\); 1 groups of equal size need \(1, 2\)"):
        write_groups(path, [group], good, {"clip": good[0]}, good, latents=False)
    textless = Group(group.prompt, 7, tuple(Chain(chain.segments[1:], chain.seed) for chain in group.chains))
    with pytest.raises(ValueError, match=r"prompt a has the segments \['ImageSegment'\]"):
        write_groups(path, [textless], good, {}, good, latents=False)
    assert list(tmp_path.iterdir()) == []
