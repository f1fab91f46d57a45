"""NumberLine's picture: the two labelled numbers, in varied looks.

The looks vary (font, size, place, colours) so that a policy must read digits and cannot learn a few
dozen pictures by heart. Everything is laid out on a 64 x 64 grid and scaled.
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID = 64
NUMBER_SIZES = (20, 22, 24)
"""Font sizes of the numbers, in units of the grid; two digits of the widest font fit."""
LABEL_SIZE = 9
# How far a number moves from its place at the right end of its half, in units of the grid. Free placement
# over the whole half, and light ink on dark paper, were tried: they kept a 0.3 M policy from learning to
# read in 1200 steps, which these ranges do not.
LARGEST_SHIFT = (16, 2)
FONTS = (None, "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
"""Font files of matplotlib; None is the font built into Pillow."""


def draw(target: int, current: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Returns the RGB picture, `size` pixels a side; `rng` alone decides its looks."""
    number_font = _font(FONTS[rng.integers(len(FONTS))], _scaled(rng.choice(NUMBER_SIZES), size))
    label_font = _font(None, _scaled(LABEL_SIZE, size))
    ink, paper = _colour(rng.integers(0, 80, 3)), _colour(rng.integers(200, 256, 3))
    shifts = rng.random((2, 2))
    image = Image.new("RGB", (size, size), paper)
    canvas = ImageDraw.Draw(image)
    for row, (label, number) in enumerate((("Target:", target), ("Current:", current))):
        top = row * size // 2
        canvas.text((_scaled(3, size), top + _scaled(1, size)), label, ink, label_font, anchor="la")
        left, upper, right, lower = number_font.getbbox(str(number), anchor="ls")
        room_x = size - (right - left) - _scaled(6, size)
        room_y = size // 2 - (lower - upper) - _scaled(13, size)
        x = size - _scaled(4, size) - right - _shift(shifts[row, 0], room_x, _scaled(LARGEST_SHIFT[0], size))
        y = top + size // 2 - _scaled(1, size) - _shift(shifts[row, 1], room_y, _scaled(LARGEST_SHIFT[1], size))
        canvas.text((x, y), str(number), ink, number_font, anchor="ls")
    return image


def _shift(share: float, room: float, largest: int) -> int:
    """Returns a whole number of pixels from 0 to what there is room for."""
    return int(share * (min(max(int(room), 0), largest) + 1))


def _scaled(units: float, size: int) -> int:
    return max(1, round(units * size / GRID))


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in values)
    return red, green, blue


@cache
def _font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    if file is None:
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType; install a Pillow wheel from PyPI")
        return font
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
