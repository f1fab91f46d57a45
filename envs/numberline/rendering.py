"""NumberLine's picture: the two labelled numbers, in varied looks.

The looks vary (font, size, place, colours) so that a policy must read digits and cannot learn a few
dozen pictures by heart. Everything is laid out on a 64 x 64 grid and scaled.
"""

import numpy as np
from PIL import Image, ImageDraw

from gflowvlm.envs.drawing import FONTS, background_and_text_colours, font, scaled, shift

NUMBER_SIZES = (20, 22, 24)
"""Font sizes of the numbers, in units of the grid; two digits of the widest font fit."""
LABEL_SIZE = 9
# How far a number moves from its place at the right end of its half, in units of the grid. Free placement
# over the whole half was tried: it kept a 0.3 M policy from learning to read in 1200 steps, which these
# ranges do not.
LARGEST_SHIFT = (16, 2)


def draw(target: int, current: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Returns the RGB picture, `size` pixels a side; `rng` alone decides its looks."""
    number_font = font(FONTS[rng.integers(len(FONTS))], scaled(rng.choice(NUMBER_SIZES), size))
    label_font = font(None, scaled(LABEL_SIZE, size))
    paper, ink = background_and_text_colours(rng)
    shifts = rng.random((2, 2))
    image = Image.new("RGB", (size, size), paper)
    canvas = ImageDraw.Draw(image)
    for row, (label, number) in enumerate((("Target:", target), ("Current:", current))):
        top = row * size // 2
        canvas.text((scaled(3, size), top + scaled(1, size)), label, ink, label_font, anchor="la")
        left, upper, right, lower = number_font.getbbox(str(number), anchor="ls")
        room_x = size - (right - left) - scaled(6, size)
        room_y = size // 2 - (lower - upper) - scaled(13, size)
        x = size - scaled(4, size) - right - shift(shifts[row, 0], room_x, scaled(LARGEST_SHIFT[0], size))
        y = top + size // 2 - scaled(1, size) - shift(shifts[row, 1], room_y, scaled(LARGEST_SHIFT[1], size))
        canvas.text((x, y), str(number), ink, number_font, anchor="ls")
    return image
