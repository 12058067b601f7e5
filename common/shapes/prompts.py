"""Training and held-out prompts that share no combination of attributes.

`python -m common.shapes.prompts DIR` writes them to `DIR/train.jsonl` and `DIR/heldout.jsonl`.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.rundir import replacing
from common.shapes.requests import Request, requests

DATA = Path(__file__).parent / "data"
OPENERS = (
    "a photo of", "a picture of", "an image of", "a drawing of", "a painting of",
    "draw", "paint", "show", "please draw", "create",
)  # fmt: skip
HELD_OUT_SHARE = 0.2  # of each tag's combinations
TRAIN_PROMPTS: dict[str, int] = {
    "single_object": 40, "two_object": 160, "counting": 336, "colors": 240, "position": 400, "color_attr": 360,
    "color": 110, "number": 120, "shape": 100, "relation": 130, "number+color": 60, "shape+color": 60,
}  # fmt: skip
HELD_OUT_PROMPTS: dict[str, int] = {
    "single_object": 10, "two_object": 34, "counting": 34, "colors": 34, "position": 34, "color_attr": 34,
    "reasoning": 60,
}  # fmt: skip

Drawn = tuple[str, Request]  # opening words and what they open


def _split(pool: Sequence[Request], rng: random.Random) -> tuple[list[Request], list[Request]]:
    """Train and held-out requests; each (first) riddle phrase gives up its own share of combinations."""
    held: set[tuple[str, ...]] = set()
    for phrase in dict.fromkeys(request.phrases[:1] for request in pool):
        combinations = sorted({request.combination for request in pool if request.phrases[:1] == phrase})
        held.update(rng.sample(combinations, round(HELD_OUT_SHARE * len(combinations))))
    return [r for r in pool if r.combination not in held], [r for r in pool if r.combination in held]


def _draw(pool: Sequence[Request], number: int, rng: random.Random) -> list[Drawn]:
    """Up to `number` distinct prompts: every request comes once before any comes again with other words."""
    pool = rng.sample(pool, len(pool))
    openers = [rng.sample(OPENERS, len(OPENERS)) for _ in pool]
    return [(o[turn], r) for turn in range(len(OPENERS)) for o, r in zip(openers, pool, strict=True)][:number]


def _cover(pool: Sequence[Request], number: int, rng: random.Random) -> list[Request]:
    """`number` requests that together use every riddle phrase, the kinds otherwise balanced."""
    left = rng.sample(pool, len(pool))
    used: set[str] = set()
    kinds: Counter[str] = Counter()
    chosen: list[Request] = []
    while left and len(chosen) < number:
        best = max(left, key=lambda r: (len(set(r.phrases) - used), -kinds[r.kind]))
        left.remove(best)
        used.update(best.phrases)
        kinds[best.kind] += 1
        chosen.append(best)
    return chosen


def _records(tag: str, drawn: Sequence[Drawn], start: int) -> Iterator[dict[str, Any]]:
    for index, (opener, request) in enumerate(drawn, start):
        yield {
            "id": f"{tag}-{index:04d}",
            "prompt": f"{opener} {request.body}",
            "tag": tag,
            "include": list(request.include),
            "exclude": request.exclude(),
        }


def make_prompts(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and the held-out records, the same for the same seed.

    A record has `id`, `prompt`, `tag` and GenEval's `include` and `exclude`. Within every tag (for
    riddles, every kind of riddle) the two lists share no combination; every riddle phrase is in both.
    """
    rng = random.Random(seed)
    train: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    for tag, pool in requests(rng).items():
        known: list[Drawn] = []
        unseen: list[Request] = []
        for kind in dict.fromkeys(request.kind for request in pool):
            ours, theirs = _split([r for r in pool if r.kind == kind], rng)
            known += _draw(ours, TRAIN_PROMPTS[kind], rng)
            unseen += theirs
        number = HELD_OUT_PROMPTS[tag]
        if tag == "reasoning":
            unseen = _cover(unseen, number, rng)
        train += _records(tag, known, 0)
        heldout += _records(tag, _draw(unseen, number, rng), len(known))
    return train, heldout


def write(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write records as JSON lines: aside first, then renamed, so that readers never see a part."""
    with replacing(path) as aside:
        aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def load(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(directory: str) -> None:
    """Write both lists into a directory, created if need be."""
    target = Path(directory)
    for name, records in zip(("train", "heldout"), make_prompts(), strict=True):
        write(records, target / f"{name}.jsonl")
        print(f"{target / name}.jsonl: {len(records)} prompts {dict(Counter(r['tag'] for r in records))}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m common.shapes.prompts DIR")
    main(sys.argv[1])
