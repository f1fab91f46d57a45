"""What the pictures of several tasks share: fonts and colours, laid out on a grid of 64 units a side."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import ImageFont

GRID = 64
FONTS = (None, "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
"""Font files of matplotlib; None is the font built into Pillow."""


def scaled(units: float, size: int) -> int:
    """Returns grid units as pixels, at least 1, in a picture of `size` pixels a side."""
    return max(1, round(units * size / GRID))


def colour(values: np.ndarray) -> tuple[int, int, int]:
    """Returns three numbers as an RGB colour."""
    red, green, blue = (int(v) for v in values)
    return red, green, blue


def background_and_text_colours(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Returns a light and a dark colour; light ink on dark paper kept a tiny policy from learning to read."""
    ink = colour(rng.integers(0, 80, 3))
    return colour(rng.integers(200, 256, 3)), ink


def shift(share: float, room: float, largest: int) -> int:
    """Returns a share of the room there is, in whole pixels from 0 to `largest`."""
    return int(share * (min(max(int(room), 0), largest) + 1))


@cache
def font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    """Returns one of `FONTS` at a size in pixels.

    Raises:
        RuntimeError: Pillow cannot draw scalable fonts.
    """
    if file is None:
        built_in = ImageFont.load_default(size)
        if not isinstance(built_in, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType; install a Pillow wheel from PyPI")
        return built_in
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
