"""Blackjack's prompt and what its demonstrations say.

The policy has to read the cards from the picture: the prompt names none of the current ones.
"""

from collections.abc import Sequence

from gflowvlm.envs.base import Reading
from gflowvlm.envs.blackjack.cards import DEALER_STANDS_AT, Card, total
from gflowvlm.envs.wording import comparisons
from gflowvlm.shared.answer_formats import FieldType

GOAL = "Beat the dealer without going over 21. hit takes a card, stand and [DONE] end the hand."
FIELDS: dict[str, FieldType] = {"dealer": str, "player": str, "total": int}


def state_text(dealer: Card, player: Sequence[Card]) -> str:
    """Returns a state as the history tells it: the dealer's open card and the player's cards, by value."""
    return f"dealer {dealer.text} player {_hand(player)}"


def reading(dealer: Card, player: Sequence[Card]) -> Reading:
    """Returns the right cards and total, and thoughts on what the 17-rule asks."""
    fields: dict[str, str | int] = {"dealer": dealer.text, "player": _hand(player), "total": total(player)}
    return Reading(fields, comparisons(total(player), DEALER_STANDS_AT))


def _hand(cards: Sequence[Card]) -> str:
    return " ".join(card.text for card in cards)
