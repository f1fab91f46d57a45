"""The picture of what the agent sees: the place, the things in it with their states, the thing in hand.

It is schematic: enough to play from, and drawn in about a millisecond. Everything is laid out on a grid
of 100 units a side.
"""

from PIL import Image, ImageDraw

from gflowvlm.envs.drawing import font
from gflowvlm.envs.household import icons
from gflowvlm.envs.household.icons import Box
from gflowvlm.envs.household.view import Place, Thing, View, kind_of

GRID = 100
FONT = "DejaVuSans.ttf"
HEADER, FOOTER = 11, 22
PAPER, WALL, INK, FAINT = (250, 249, 246), (228, 234, 238), (25, 25, 30), (110, 110, 120)
BADGES = {
    "hot": (205, 45, 30),
    "cold": (30, 95, 200),
    "clean": (20, 135, 100),
    "sliced": (120, 90, 40),
    "on": (190, 140, 0),
}
CELL_HEIGHT = 0.65
"""Smallest height of a thing's cell as a share of its width."""
SMALLEST_TEXT = 6
"""Letters below this many pixels are left out: nobody could read them."""


def draw(seen: View, size: int) -> Image.Image:
    """Returns the RGB picture, `size` pixels a side."""
    image = Image.new("RGB", (size, size), PAPER)
    canvas = ImageDraw.Draw(image)
    unit = size / GRID
    top, bottom = HEADER * unit, (GRID - FOOTER) * unit
    canvas.rectangle((0, top, size, bottom), WALL)
    title = ", ".join(place.name for place in seen.here) if seen.here else "middle of the room"
    _text(canvas, (2 * unit, 0, size - 2 * unit, top), title, INK, 8 * unit, "l")
    if seen.here:
        width = size / len(seen.here)
        for index, place in enumerate(seen.here):
            _place(canvas, (index * width, top, (index + 1) * width, bottom), place, unit)
    elif seen.room:
        _room(canvas, (unit, top + unit, size - unit, bottom - unit), seen.room, unit)
    _hand(canvas, (0, bottom, size, size), seen.held, unit)
    return image


def _place(canvas: ImageDraw.ImageDraw, box: Box, place: Place, unit: float) -> None:
    """Draws a receptacle and what is in or on it."""
    left, top, right, bottom = box
    body = (left + 3 * unit, top + 3 * unit, right - 3 * unit, bottom - 3 * unit)
    inside = icons.furniture(canvas, body, kind_of(place.name), place.openable, place.closed)
    if place.closed:
        _text(canvas, inside, "closed", INK, 9 * unit, "m")
        return
    if place.openable:
        strip = (inside[0], inside[1], inside[2], inside[1] + 7 * unit)
        _text(canvas, strip, "open", FAINT, 6 * unit, "m")
        inside = (inside[0], strip[3], inside[2], inside[3])
    if len(place.things) == 0:
        upper = (inside[0], inside[1], inside[2], (inside[1] + inside[3]) / 2)
        _text(canvas, upper, "empty", FAINT, 7 * unit, "m")
        return
    _things(canvas, inside, place.things, unit)


def _room(canvas: ImageDraw.ImageDraw, box: Box, names: tuple[str, ...], unit: float) -> None:
    """Draws every receptacle of the room, small and closed, with its name."""
    cells = _cells(box, len(names))
    line = min(6 * unit, 0.4 * (cells[0][3] - cells[0][1]))
    pixels = min(_pixels(canvas, name, cells[0], line) for name in names)
    for name, (left, top, right, bottom) in zip(names, cells, strict=False):
        icon = (left + unit, top + unit, right - unit, bottom - line)
        icons.furniture(canvas, _square(icon), kind_of(name), openable=True, closed=True)
        _text(canvas, (left, bottom - line, right, bottom), name, INK, pixels, "m")


def _hand(canvas: ImageDraw.ImageDraw, box: Box, held: tuple[Thing, ...], unit: float) -> None:
    """Draws what is in the hand: icon, name, marks."""
    left, top, right, bottom = box
    label = (left + 2 * unit, top, left + 27 * unit, bottom)
    _text(canvas, label, "in hand:", INK, 6.5 * unit, "l")
    if len(held) == 0:
        _text(canvas, (label[2], top, right, bottom), "nothing", FAINT, 6.5 * unit, "l")
    width = (right - label[2]) / max(len(held), 1)
    for index, thing in enumerate(held):
        x, middle = label[2] + index * width, (top + bottom) / 2
        icon = (x, top + unit, x + bottom - top - 2 * unit, bottom - unit)
        icons.thing(canvas, icon, kind_of(thing.name), lit=False)
        x = icon[2] + 2 * unit
        _text(canvas, (x, top, right, middle if thing.marks else bottom), thing.name, INK, 7 * unit, "l")
        for mark in thing.marks:
            badge = (x, middle + unit, x + 16 * unit, middle + 8 * unit)
            _badge(canvas, badge, mark, 5.5 * unit)
            x = badge[2] + unit


def _things(canvas: ImageDraw.ImageDraw, box: Box, things: tuple[Thing, ...], unit: float) -> None:
    """Draws things: the icon, the name below it, the marks in its corner."""
    cells = _cells(box, len(things))
    line = min(6 * unit, 0.3 * (cells[0][3] - cells[0][1]))
    pixels = min(_pixels(canvas, thing.name, cells[0], line) for thing in things)
    for thing, (left, top, right, bottom) in zip(things, cells, strict=False):
        icon = _square((left, top + unit / 2, right, bottom - line))
        icons.thing(canvas, icon, kind_of(thing.name), lit="on" in thing.marks)
        _text(canvas, (left, bottom - line, right, bottom), thing.name, INK, pixels, "m")
        for row, mark in enumerate(thing.marks):
            wide = min((right - left) / 2, 16 * unit)
            badge = (left + unit / 2, top + row * line, left + wide, top + (row + 1) * line)
            _badge(canvas, badge, mark, line)


def _badge(canvas: ImageDraw.ImageDraw, box: Box, mark: str, height: float) -> None:
    canvas.rounded_rectangle(box, (box[3] - box[1]) / 4, BADGES[mark])
    _text(canvas, box, mark, (255, 255, 255), height, "m")


def _cells(box: Box, count: int) -> list[Box]:
    """Returns at least `count` equal cells, row by row, wider than high, at the bottom of a box."""
    left, top, right, bottom = box
    columns = 1
    while columns * max(1, int((bottom - top) * columns / ((right - left) * CELL_HEIGHT))) < count:
        columns += 1
    rows = -(-count // columns)
    width = (right - left) / columns
    height = min((bottom - top) / rows, width)
    first = bottom - rows * height
    return [
        (left + c * width, first + r * height, left + (c + 1) * width, first + (r + 1) * height)
        for r in range(rows)
        for c in range(columns)
    ]


def _square(box: Box) -> Box:
    """Returns the largest square in the middle of a box."""
    left, top, right, bottom = box
    half = max(min(right - left, bottom - top), 2) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - half, y - half, x + half, y + half


def _text(
    canvas: ImageDraw.ImageDraw, box: Box, text: str, colour: tuple[int, int, int], height: float, anchor: str
) -> None:
    """Writes a text into a box, smaller where it does not fit; `anchor` is ``l`` (left) or ``m`` (middle)."""
    left, top, right, bottom = box
    pixels = _pixels(canvas, text, box, height)
    if pixels >= SMALLEST_TEXT:
        x = left if anchor == "l" else (left + right) / 2
        canvas.text((x, (top + bottom) / 2), text, colour, font(FONT, pixels), anchor=f"{anchor}m")


def _pixels(canvas: ImageDraw.ImageDraw, text: str, box: Box, height: float) -> int:
    """Returns the largest font size, at most `height`, at which a text is no wider than a box."""
    pixels = int(height)
    while pixels >= SMALLEST_TEXT and canvas.textlength(text, font(FONT, pixels)) > box[2] - box[0] - 1:
        pixels -= 1
    return pixels
