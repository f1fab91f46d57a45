"""Blackjack's prompt and demonstrations.

The policy has to read the cards from the picture: the prompt names none of the current ones.
"""

from collections.abc import Sequence

from gflowvlm.envs.blackjack.cards import DEALER_STANDS_AT, Card, total
from gflowvlm.envs.wording import comparisons
from gflowvlm.shared.response import format_response

GOAL = "Beat the dealer without going over 21. hit takes a card, stand and [DONE] end the hand."
ANSWER = 'Answer: {"dealer": "", "player": "", "total": , "thoughts": "", "action": ""}'


def state_text(dealer: Card, player: Sequence[Card]) -> str:
    """Returns a state as the history tells it: the dealer's open card and the player's cards, by value."""
    return f"dealer {dealer.text} player {_hand(player)}"


def demonstrations(action: str, dealer: Card, player: Sequence[Card]) -> list[str]:
    """Returns responses with the right cards and total, a thought on what the 17-rule asks, and the action."""
    fields = {"dealer": dealer.text, "player": _hand(player), "total": total(player)}
    thoughts = comparisons(total(player), DEALER_STANDS_AT)
    return [format_response(action, thought, fields) for thought in thoughts]


def _hand(cards: Sequence[Card]) -> str:
    return " ".join(card.text for card in cards)
