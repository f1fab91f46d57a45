"""Pictograms of things and furniture, by the words in ALFWorld's names."""

from collections.abc import Callable

from PIL import ImageDraw

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; pixels."""
Colour = tuple[int, int, int]

OUTLINE: Colour = (40, 40, 45)
WATER: Colour = (130, 190, 225)
LIGHT: Colour = (255, 225, 90)
DARK_INSIDE: Colour = (242, 240, 232)

# Shape and colour of every thing of ALFWorld that can be taken; unknown ones are grey boxes.
THINGS: dict[str, tuple[str, Colour]] = {
    "alarmclock": ("round", (200, 90, 90)),
    "apple": ("round", (200, 40, 45)),
    "baseballbat": ("long", (170, 120, 70)),
    "basketball": ("round", (225, 120, 40)),
    "book": ("box", (120, 60, 140)),
    "bowl": ("bowl", (210, 200, 180)),
    "box": ("box", (190, 150, 100)),
    "bread": ("loaf", (200, 150, 80)),
    "butterknife": ("long", (190, 190, 200)),
    "candle": ("bottle", (235, 225, 170)),
    "cd": ("round", (190, 200, 225)),
    "cellphone": ("tall", (50, 50, 60)),
    "cloth": ("flat", (120, 170, 210)),
    "creditcard": ("flat", (60, 100, 180)),
    "cup": ("mug", (150, 200, 220)),
    "desklamp": ("lamp", (90, 90, 100)),
    "dishsponge": ("flat", (235, 205, 70)),
    "egg": ("egg", (245, 235, 215)),
    "floorlamp": ("lamp", (90, 90, 100)),
    "fork": ("long", (170, 170, 180)),
    "glassbottle": ("bottle", (170, 215, 200)),
    "handtowel": ("flat", (220, 150, 160)),
    "houseplant": ("bottle", (60, 140, 70)),
    "kettle": ("mug", (150, 150, 160)),
    "keychain": ("round", (210, 180, 60)),
    "knife": ("long", (120, 120, 135)),
    "ladle": ("long", (150, 130, 110)),
    "laptop": ("box", (90, 95, 105)),
    "lettuce": ("round", (100, 175, 70)),
    "mug": ("mug", (220, 120, 70)),
    "newspaper": ("flat", (225, 225, 220)),
    "pan": ("pan", (70, 70, 75)),
    "papertowel": ("tall", (245, 245, 245)),
    "papertowelroll": ("tall", (245, 245, 245)),
    "pen": ("long", (40, 60, 150)),
    "pencil": ("long", (230, 180, 50)),
    "peppershaker": ("bottle", (80, 70, 65)),
    "pillow": ("loaf", (215, 215, 240)),
    "plate": ("bowl", (240, 240, 245)),
    "plunger": ("long", (160, 60, 50)),
    "pot": ("pan", (130, 135, 145)),
    "potato": ("egg", (175, 135, 85)),
    "remotecontrol": ("tall", (75, 75, 85)),
    "saltshaker": ("bottle", (240, 240, 245)),
    "soapbar": ("loaf", (240, 190, 205)),
    "soapbottle": ("bottle", (150, 110, 200)),
    "spatula": ("long", (90, 80, 75)),
    "spoon": ("long", (200, 200, 210)),
    "spraybottle": ("bottle", (90, 170, 220)),
    "statue": ("bottle", (180, 170, 150)),
    "tennisracket": ("pan", (90, 160, 90)),
    "tissuebox": ("box", (220, 200, 230)),
    "toiletpaper": ("round", (245, 245, 245)),
    "toiletpaperroll": ("round", (245, 245, 245)),
    "tomato": ("round", (225, 70, 45)),
    "vase": ("bottle", (80, 120, 180)),
    "watch": ("round", (120, 110, 90)),
    "wateringcan": ("mug", (90, 150, 110)),
    "winebottle": ("bottle", (70, 100, 60)),
}
BASINS = ("sinkbasin", "bathtubbasin", "sink", "bathtub", "toilet")
CASES: dict[str, Colour] = {
    "fridge": (205, 215, 222),
    "microwave": (120, 125, 135),
    "cabinet": (185, 145, 100),
    "drawer": (200, 165, 120),
    "safe": (130, 140, 140),
    "box": (200, 165, 115),
}
SOFT: dict[str, Colour] = {
    "bed": (150, 170, 210),
    "sofa": (175, 120, 110),
    "armchair": (190, 140, 110),
    "ottoman": (165, 140, 170),
}
BINS = ("garbagecan", "laundryhamper")
WOOD: Colour = (190, 155, 115)


def thing(canvas: ImageDraw.ImageDraw, box: Box, kind: str, lit: bool) -> None:
    """Draws a thing; a lit lamp shines."""
    shape, colour = THINGS.get(kind, ("box", (170, 170, 170)))
    if lit:
        canvas.ellipse(box, LIGHT)
    SHAPES[shape](canvas, box, colour)


def furniture(canvas: ImageDraw.ImageDraw, box: Box, kind: str, openable: bool, closed: bool) -> Box:
    """Draws a receptacle and returns the part of it where its content goes."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    line = max(1, round(width / 60))
    if kind in CASES or (openable and not closed):
        return _case(canvas, box, CASES.get(kind, WOOD), closed)
    if kind in BASINS:
        rim = bottom - height * 0.3
        points = [(left, rim), (right, rim), (right - width * 0.12, bottom), (left + width * 0.12, bottom)]
        canvas.polygon(points, WATER, OUTLINE, line)
        canvas.line((left + width * 0.5, rim, left + width * 0.5, rim - height * 0.14), OUTLINE, 2 * line)
        return left + width * 0.1, top, right - width * 0.1, bottom - height * 0.08
    if kind in BINS:
        points = [(left + width * 0.1, top + height * 0.5), (right - width * 0.1, top + height * 0.5)]
        points += [(right - width * 0.2, bottom), (left + width * 0.2, bottom)]
        canvas.polygon(points, (160, 165, 160), OUTLINE, line)
        return left + width * 0.2, top, right - width * 0.2, bottom - height * 0.05
    if kind in SOFT:
        canvas.rounded_rectangle((left, top + height * 0.55, right, bottom), width * 0.06, SOFT[kind], OUTLINE, line)
        canvas.rounded_rectangle(
            (left, top + height * 0.3, left + width * 0.1, bottom), width * 0.04, SOFT[kind], OUTLINE
        )
        return left + width * 0.1, top, right, bottom - height * 0.1
    board = bottom - height * 0.18
    canvas.rectangle((left + width * 0.06, board, left + width * 0.14, bottom), WOOD, OUTLINE)
    canvas.rectangle((right - width * 0.14, board, right - width * 0.06, bottom), WOOD, OUTLINE)
    canvas.rectangle((left, board, right, board + height * 0.07), WOOD, OUTLINE, line)
    return left, top, right, board


def _case(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour, closed: bool) -> Box:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    line = max(1, round(width / 60))
    if closed:
        canvas.rectangle(box, colour, OUTLINE, line)
        canvas.rectangle((right - width * 0.15, top + height * 0.4, right - width * 0.1, top + height * 0.6), OUTLINE)
        return left, top, right - width * 0.15, bottom
    door = right - width * 0.12
    canvas.rectangle((left, top, door, bottom), DARK_INSIDE, colour, 3 * line)
    canvas.polygon([(door, top), (right, top + height * 0.08), (right, bottom - height * 0.08), (door, bottom)], colour)
    return left + width * 0.05, top + height * 0.06, door - width * 0.05, bottom - height * 0.05


def _part(box: Box, left: float, top: float, right: float, bottom: float) -> Box:
    """Returns a part of a box, given in shares of its sides."""
    x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return x + left * width, y + top * height, x + right * width, y + bottom * height


def _round(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.ellipse(_part(box, 0.15, 0.15, 0.85, 0.85), colour, OUTLINE)


def _egg(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.ellipse(_part(box, 0.22, 0.1, 0.78, 0.9), colour, OUTLINE)


def _loaf(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.rounded_rectangle(_part(box, 0.05, 0.3, 0.95, 0.8), (box[2] - box[0]) * 0.2, colour, OUTLINE)


def _flat(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.rectangle(_part(box, 0.05, 0.4, 0.95, 0.75), colour, OUTLINE)


def _box(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.rectangle(_part(box, 0.12, 0.2, 0.88, 0.85), colour, OUTLINE)
    canvas.line(_part(box, 0.12, 0.35, 0.88, 0.35), OUTLINE)


def _tall(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.rectangle(_part(box, 0.32, 0.1, 0.68, 0.9), colour, OUTLINE)


def _bottle(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.rectangle(_part(box, 0.43, 0.08, 0.57, 0.4), colour, OUTLINE)
    canvas.rounded_rectangle(_part(box, 0.3, 0.35, 0.7, 0.92), (box[2] - box[0]) * 0.08, colour, OUTLINE)


def _mug(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.ellipse(_part(box, 0.6, 0.35, 0.9, 0.7), None, OUTLINE, 2)
    canvas.rectangle(_part(box, 0.22, 0.25, 0.7, 0.85), colour, OUTLINE)


def _bowl(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.chord(_part(box, 0.05, 0.05, 0.95, 0.85), 0, 180, colour, OUTLINE)


def _pan(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.line(_part(box, 0.6, 0.45, 1.0, 0.3), OUTLINE, max(2, int((box[2] - box[0]) * 0.1)))
    canvas.ellipse(_part(box, 0.05, 0.25, 0.7, 0.85), colour, OUTLINE)


def _long(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    thick = max(2, int((box[2] - box[0]) * 0.1))
    canvas.line(_part(box, 0.15, 0.85, 0.8, 0.2), OUTLINE, thick + 2)
    canvas.line(_part(box, 0.15, 0.85, 0.8, 0.2), colour, thick)
    canvas.ellipse(_part(box, 0.65, 0.08, 0.92, 0.35), colour, OUTLINE)


def _lamp(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.line(_part(box, 0.5, 0.4, 0.5, 0.85), colour, max(2, int((box[2] - box[0]) * 0.08)))
    canvas.rectangle(_part(box, 0.25, 0.85, 0.75, 0.93), colour)
    x, y, right, bottom = _part(box, 0.2, 0.1, 0.8, 0.45)
    quarter = (right - x) / 4
    canvas.polygon([(x + quarter, y), (right - quarter, y), (right, bottom), (x, bottom)], colour, OUTLINE)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, Colour], None]] = {
    "round": _round,
    "egg": _egg,
    "loaf": _loaf,
    "flat": _flat,
    "box": _box,
    "tall": _tall,
    "bottle": _bottle,
    "mug": _mug,
    "bowl": _bowl,
    "pan": _pan,
    "long": _long,
    "lamp": _lamp,
}
