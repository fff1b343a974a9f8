"""A contact sheet: samples and their captions on one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from clipq.data.decode import decode_pil

COLUMNS = 8
CELL = 180
"""Pixels of a cell in width; its picture is as high."""
MARGIN = 8
LINES = 3
LINE = 14
"""Pixels of a line of text."""


def contact_sheet(samples: Sequence[tuple[bytes, str]]) -> Image.Image:
    """A grid of (encoded image, caption), upright and in proportion; a grey field where one cannot be decoded."""
    columns = max(1, min(COLUMNS, len(samples)))
    rows = max(1, -(-len(samples) // columns))
    width, height = CELL + MARGIN, CELL + LINES * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LINE - 3)
    for number, (data, caption) in enumerate(samples):
        left, top = number % columns * width + MARGIN, number // columns * height + MARGIN
        picture = _thumbnail(data)
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        for line, text in enumerate(_wrapped(caption)):
            draw.text((left, top + CELL + 4 + line * LINE), text, "black", font)
    return sheet


def _thumbnail(data: bytes) -> Image.Image:
    try:
        picture = decode_pil(data)
    except ValueError:
        return Image.new("RGB", (CELL, CELL), "lightgrey")
    scale = CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _wrapped(caption: str) -> list[str]:
    """At most `LINES` lines that fit a cell, the last with dots where there is more."""
    return textwrap.wrap(caption, CELL // 6, max_lines=LINES, placeholder=" …")
