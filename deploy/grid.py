"""Evaluated images as one picture for people: a row per prompt, its images with the reasoning under each."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from deploy.evaluation import Sample

CELL, GAP, FONT_SIZE, LINE, CHARACTER = 176, 12, 11, 14, 6.5  # px; characters are so wide on average
RIGHT, WRONG, INK = "#137a3f", "#b3261e", "#1b1f24"


def sample_grid(samples: Sequence[Sample], images_per_prompt: int = 4) -> Image.Image:
    """Samples with a png, in their order; a right image has a green frame, a wrong one a red one, one that was not
    scored none. ValueError without samples."""
    rows = [list(of)[:images_per_prompt] for _, of in groupby(samples, key=lambda s: (s.tag, s.prompt))]
    if not rows:
        raise ValueError("there are no samples to draw; raise evaluation.samples")
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE)
    columns = max(map(len, rows))
    titles = [_wrapped(f"{row[0].prompt}  [{row[0].tag}]", columns * (CELL + GAP)) for row in rows]
    texts = [[_wrapped(sample.reasoning, CELL) for sample in row] for row in rows]
    heights = [
        LINE * (len(title) + max(map(len, of_row))) + CELL + 3 * GAP
        for title, of_row in zip(titles, texts, strict=True)
    ]
    canvas = Image.new("RGB", (GAP + columns * (CELL + GAP), GAP + sum(heights)), "white")
    pen = ImageDraw.Draw(canvas)
    top = GAP
    for row, title, of_row, height in zip(rows, titles, texts, heights, strict=True):
        pen.text((GAP, top), "\n".join(title), INK, font, spacing=LINE - FONT_SIZE)
        below = top + LINE * len(title) + GAP // 2
        for column, (sample, text) in enumerate(zip(row, of_row, strict=True)):
            left = GAP + column * (CELL + GAP)
            canvas.paste(_fitted(sample.png), (left, below))
            if sample.right is not None:
                pen.rectangle((left - 3, below - 3, left + CELL + 2, below + CELL + 2), None, _frame(sample), 3)
            pen.text((left, below + CELL + GAP // 2), "\n".join(text), INK, font, spacing=LINE - FONT_SIZE)
        top += height
    return canvas


def _wrapped(text: str, width: float) -> list[str]:
    """Lines of at most `width` px, about. A policy may say anything; what cannot be shown (controls, separators of
    lines, halves of characters) would end the drawing, and is a space."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.wrap(shown, int(width / CHARACTER))


def _frame(sample: Sample) -> str:
    return RIGHT if sample.right else WRONG


def _fitted(png: bytes) -> Image.Image:
    """The image within a cell; small pixels stay sharp squares."""
    with Image.open(io.BytesIO(png)) as image:
        small = max(image.size) <= CELL
        scale = CELL / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        resized = image.convert("RGB").resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), "white")
    cell.paste(resized)
    return cell
