"""A detector for the shapes task: nearest color, connected blobs, best matching outline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.shapes.scene import cover
from common.shapes.vocab import BACKGROUND, COLORS, SHAPES, UNKNOWN

MIN_AREA = 1 / 64  # of the image; smaller blobs are noise
MIN_IOU = 0.8  # below it a blob looks like none of the shapes
MAX_SIDE = 2 / 3  # of the image's; a larger blob is a flooded canvas, not a shape
MIN_ASPECT = 0.7  # a blob this much thinner than high, or the reverse, is none of the shapes either

_GRID = np.linspace(-2.75, 2.75, 23)  # in standard deviations; the widest shape, the cross, reaches to 2.4
_NAMES = tuple(COLORS)
_BACKGROUND = np.array(BACKGROUND, np.float32)
_PALETTE = np.array([*COLORS.values(), BACKGROUND], np.float32)
_TOWARDS = (_PALETTE[:-1] - _BACKGROUND) / ((_PALETTE[:-1] - _BACKGROUND) ** 2).sum(1, keepdims=True)


@dataclass(frozen=True)
class Detection:
    """A blob: its shape (or "unknown"), color, box (x0, y0, x1, y1) in px and score, the outline's IoU."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    score: float


def _sample(image: NDArray[np.floating], y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear samples of an image [h, w] on the grid of the rows `y` and columns `x`, 0 outside."""

    def weights(at: NDArray[np.float64], size: int) -> NDArray[np.float64]:
        return np.maximum(1 - abs(at[:, None] - np.arange(size)), 0)

    return weights(y, image.shape[0]) @ image @ weights(x, image.shape[1]).T


def _normalise(alpha: NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """A blob's coverage [h, w], resampled about its centroid in units of its standard deviations, and their ratio.

    Moments use every pixel of the blob, so that a noisy or blurred edge moves them far less than its box. The
    ratio is the lesser over the greater standard deviation.
    """
    alpha = np.clip(2 * alpha - 0.5, 0, 1)  # undoes mild blur and silences mild noise
    columns, rows = alpha.sum(0), alpha.sum(1)
    area = alpha.sum()
    xs, ys = np.arange(len(columns)), np.arange(len(rows))
    x, y = columns @ xs / area, rows @ ys / area
    sx, sy = np.sqrt(columns @ (xs - x) ** 2 / area), np.sqrt(rows @ (ys - y) ** 2 / area)
    return _sample(alpha, y + sy * _GRID, x + sx * _GRID), float(min(sx, sy) / max(sx, sy))


def _template(shape: str) -> NDArray[np.float64]:
    """What a shape looks like to `_normalise`, averaged over where its centre may lie within a pixel."""
    shifts = np.linspace(-0.4, 0.4, 5)
    return np.mean([_normalise(cover(shape, 6.0, dx, dy))[0] for dx in shifts for dy in shifts], axis=0)


_TEMPLATES = np.stack([_template(shape) for shape in SHAPES])


def _classify(alpha: NDArray[np.floating]) -> tuple[str, float]:
    """The shape that overlaps a blob's coverage [h, w] best, and their intersection over union."""
    blob, aspect = _normalise(alpha)
    iou = np.minimum(_TEMPLATES, blob).sum((1, 2)) / np.maximum(_TEMPLATES, blob).sum((1, 2))
    best = int(iou.argmax())
    known = iou[best] >= MIN_IOU and aspect >= MIN_ASPECT
    return (SHAPES[best] if known else UNKNOWN), float(iou[best])


def detect(image: NDArray[np.uint8]) -> list[Detection]:
    """Find the blobs of an image, uint8 [H, W, 3], best score first.

    ValueError for any other type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3]")
    pixels = image.astype(np.float32)
    # argmin |p - c|^2 = argmax 2 p.c - |c|^2
    nearest = (pixels @ (2 * _PALETTE.T) - (_PALETTE**2).sum(1)).argmax(2)
    empty = nearest == len(_NAMES)
    least = MIN_AREA * nearest.size
    found: list[Detection] = []
    for index, area in enumerate(np.bincount(nearest.ravel(), minlength=len(_PALETTE))[: len(_NAMES)]):
        if area < least:
            continue
        labels, _ = ndimage.label(nearest == index)
        for label, (rows, cols) in enumerate(ndimage.find_objects(labels), start=1):
            if (labels[rows, cols] == label).sum() < least:
                continue
            # one pixel more on each side holds the half-covered edge
            near = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in (rows, cols))
            own = (labels[near] == label) | empty[near]
            alpha = np.clip((pixels[near] - _BACKGROUND) @ _TOWARDS[index], 0, 1) * own
            shape, score = _classify(alpha)
            if max((rows.stop - rows.start) / image.shape[0], (cols.stop - cols.start) / image.shape[1]) > MAX_SIDE:
                shape = UNKNOWN
            box = (float(cols.start), float(rows.start), float(cols.stop), float(rows.stop))
            found.append(Detection(shape, _NAMES[index], box, score))
    return sorted(found, key=lambda d: -d.score)
