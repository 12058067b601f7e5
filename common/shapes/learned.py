"""A learned, differentiable scorer of the shapes task: a small network reads the four cells of an image, and the exam
is taken on what it read.

It has seen rendered scenes only (`common/shapes/fit_learned.py`), so unlike the detector it can be fooled: as a reward
it can be hacked, with the strict detector as the truth, and its gradient reaches the pixels, which ReFL needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common.shapes.reasoning import ideal_detections
from common.shapes.scene import Item, Scene
from common.shapes.score import asked_for, relations
from common.shapes.vocab import ANY, CELLS, COLORS, RELATIONS, SHAPES, SIZE

WEIGHTS = Path(__file__).parent / "data" / "learned.safetensors"
NOTHING = len(SHAPES)
_COLORS = tuple(COLORS)


class SceneReader(nn.Module):
    """Pixels -> for every cell, in the order of CELLS, which shape is there, if any, and in which color."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 4, stride=4),  # 8 x 8 -> the 2 x 2 cells
            nn.SiLU(),
        )
        self.head = nn.Conv2d(64, NOTHING + 1 + len(COLORS), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [M, 3, H, W] in [-1, 1] -> logits of shapes [M, 4, 6] (last: nothing) and of colors [M, 4, 6]."""
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        cells = self.head(self.features(pixels)).flatten(2).transpose(1, 2)
        return cells[..., : NOTHING + 1], cells[..., NOTHING + 1 :]


def load_reader(device: str = "cpu") -> SceneReader:
    """The shipped reader, frozen."""
    reader = SceneReader()
    reader.load_state_dict(load_file(WEIGHTS))
    return reader.requires_grad_(False).eval().to(device)


def learned_score(reader: SceneReader, pixels: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Differentiable reward [M] in [0, 1] of images [M, 3, H, W] in [-1, 1], one prompt's metadata each."""
    shapes, colors = (logits.softmax(-1) for logits in reader(pixels))
    score = pixels.new_zeros(len(metadata))
    of_prompt: dict[int, list[int]] = {}
    for row, asked in enumerate(metadata):
        of_prompt.setdefault(id(asked), []).append(row)
    for rows in of_prompt.values():
        score[rows] = expected_exam(metadata[rows[0]], shapes[rows], colors[rows])
    return score


def expected_exam(metadata: Mapping[str, Any], shapes: Tensor, colors: Tensor) -> Tensor:
    """Mean probability [M] of a yes to the questions of `score.exam` and of `exclude`, when a cell shows a shape with
    probability shapes [M, 4, 6] in a color with probability colors [M, 4, 6], whatever the other cells show."""

    def shown(entry: Mapping[str, Any]) -> Tensor:
        name = entry["class"]
        return 1 - shapes[..., NOTHING] if name == ANY else shapes[..., SHAPES.index(name)]

    include = metadata["include"]
    answers: list[Tensor] = []
    for entry in include:
        cells, count = shown(entry), entry["count"]
        number = _number_of(cells)
        fewest, most = asked_for(include, entry["class"])
        answers += [1 - number[:, 0], number[:, fewest : most + 1].sum(1)]
        if color := entry.get("color"):
            answers.append(_number_of(cells * colors[..., _COLORS.index(color)])[:, count:].sum(1))
        if entry.get("position") is not None:
            relation, target = entry["position"]
            pairs = cells[:, :, None] * shown(include[target])[:, None, :] * _HOLDS[relation].to(cells)
            answers.append(1 - (1 - pairs).flatten(1).prod(1))
    answers += [_number_of(shown(entry))[:, : entry["count"]].sum(1) for entry in metadata.get("exclude") or ()]
    return torch.stack(answers).mean(0)


def _number_of(cells: Tensor) -> Tensor:
    """Independent probabilities [M, 4] -> the distribution [M, 5] of how many happen."""
    number = F.pad(torch.ones_like(cells[:, :1]), (0, cells.shape[1]))
    for p in cells.split(1, 1):
        number = number * (1 - p) + F.pad(number[:, :-1], (1, 0)) * p
    return number


def _holds(relation: str) -> Tensor:
    """[4, 4]: whether something centred in one cell stands in the relation to something centred in another."""
    scene = Scene(tuple(Item(_COLORS[0], SHAPES[0], cell) for cell in CELLS))
    boxes = ideal_detections(scene)
    return torch.tensor([[relation in relations(a, b) for b in boxes] for a in boxes])


_HOLDS = {relation: _holds(relation) for relation in RELATIONS}
