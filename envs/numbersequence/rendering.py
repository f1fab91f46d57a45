"""NumberSequence's picture: the numbers in reading order, a question mark for each that is missing.

The looks vary (font, size, place, colours), so that a policy must read digits.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gflowvlm.envs.drawing import FONTS, background_and_text_colours, font, shift

SIZES = (0.56, 0.62, 0.68)
"""Font sizes as shares of a cell's side; wide numbers get a smaller one."""
LARGEST_SHIFT = 0.15
"""How far a number moves about the middle of its cell, as a share of the cell's side."""


def draw(numbers: Sequence[int], missing: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Returns the RGB picture, `size` pixels a side; `rng` alone decides its looks."""
    texts = [str(number) for number in numbers] + ["?"] * missing
    columns = math.ceil(math.sqrt(len(texts)))
    cell = size // columns
    top = (size - math.ceil(len(texts) / columns) * cell) // 2
    file = FONTS[rng.integers(len(FONTS))]
    chosen = _fitting(file, texts, round(cell * rng.choice(SIZES)), cell - 2)
    paper, ink = background_and_text_colours(rng)
    image = Image.new("RGB", (size, size), paper)
    canvas = ImageDraw.Draw(image)
    for place, text in enumerate(texts):
        left, upper, right, lower = chosen.getbbox(text, anchor="ls")
        x = place % columns * cell + _place(rng.random(), cell, right - left) - left
        y = top + place // columns * cell + _place(rng.random(), cell, lower - upper) - upper
        canvas.text((x, y), text, ink, chosen, anchor="ls")
    return image


def _fitting(file: str | None, texts: Sequence[str], pixels: int, width: int) -> ImageFont.FreeTypeFont:
    """Returns the font at the largest size, up to `pixels`, in which every text fits the width."""
    while pixels > 1 and max(_width(file, pixels, text) for text in texts) > width:
        pixels -= 1
    return font(file, pixels)


def _place(share: float, cell: int, length: float) -> int:
    """Returns where something of a length begins in a cell: about its middle, at least one pixel inside."""
    room = int(cell - 2 - length)
    largest = min(max(room, 0), round(LARGEST_SHIFT * cell))
    return 1 + (room - largest) // 2 + shift(share, room, largest)


def _width(file: str | None, pixels: int, text: str) -> float:
    left, _, right, _ = font(file, pixels).getbbox(text, anchor="ls")
    return right - left
