"""Blackjack's picture: the dealer's cards above the player's, from gymnasium's card pictures.

Cards are never drawn smaller than their pixel art: where the picture is too small for that, a row shows the upper
part of its cards, as if they were held one behind the other. The rank in the upper left corner always shows.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import gymnasium
from PIL import Image

from gflowvlm.envs.blackjack.cards import Card
from gflowvlm.envs.drawing import scaled

TABLE = (7, 99, 36)
"""The green of gymnasium's table."""

BACK = "Card"
"""Name of the picture of a card that lies face down."""

ART_HEIGHT = 68
"""Height of a card in pixels of its pixel art."""

CARD_ASPECT = 444 / 616
CORNER = 10 / 49
"""Share of a card's width that shows its rank."""

_PICTURES = Path(gymnasium.__file__).parent / "envs" / "toy_text" / "img"


def draw(dealer: Sequence[Card | None], player: Sequence[Card], size: int) -> Image.Image:
    """Returns the RGB picture, `size` pixels a side; None is a card that lies face down."""
    image = Image.new("RGB", (size, size), TABLE)
    for row, hand in enumerate((dealer, player)):
        names = [BACK if card is None else f"{card.suit}{card.rank}" for card in hand]
        image.paste(_row(names, size), (0, row * size // 2))
    return image


def _row(names: Sequence[str], size: int) -> Image.Image:
    """Returns one hand, its cards overlapping where they do not fit beside each other."""
    row = Image.new("RGB", (size, size // 2), TABLE)
    margin = scaled(1, size)
    room = size - 2 * margin
    height = min(max(size // 2 - 2 * margin, ART_HEIGHT), int(room / len(names) / CORNER / CARD_ASPECT))
    width = round(height * CARD_ASPECT)
    apart = float(width + margin)
    if len(names) > 1:
        apart = min(apart, max((room - width) / (len(names) - 1), width * CORNER))
    for place, name in enumerate(names):
        card = _card(name, width, height)
        row.paste(card, (margin + round(place * apart), margin), card)
    return row


@cache
def _card(name: str, width: int, height: int) -> Image.Image:
    with Image.open(_PICTURES / f"{name}.png") as picture:
        return picture.convert("RGBA").resize((width, height), Image.Resampling.BOX)
