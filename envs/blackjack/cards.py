"""Decks, and how a hand is settled: the rules are those of gymnasium's `Blackjack-v1`.

Cards are drawn with replacement, so a deck is a row of independent cards. It is dealt in gymnasium's order: two
to the dealer, the first of them face up, two to the player, then one to whoever takes one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gymnasium.envs.toy_text.blackjack import cmp, is_bust, is_natural, score, sum_hand

RANKS = "A23456789TJQK"
SUITS = "CDHS"
DEALER_STANDS_AT = 17

DECK_SIZE = 64
"""More cards than one hand can take: 22 for the player (21 aces are no bust), and at most 17 for the dealer."""


class Card(NamedTuple):
    """One card.

    Attributes:
        rank: One of `RANKS`; T is 10.
        suit: One of `SUITS`.
    """

    rank: str
    suit: str

    @property
    def value(self) -> int:
        """1 for an ace, 10 for T, J, Q and K, as gymnasium counts."""
        return min(RANKS.index(self.rank) + 1, 10)

    @property
    def text(self) -> str:
        """The value as text, A for an ace, which can be 1 or 11."""
        return "A" if self.rank == "A" else str(self.value)


def draw_deck(rng: np.random.Generator) -> tuple[Card, ...]:
    """Returns a deck: `DECK_SIZE` independent cards, every rank and suit equally likely."""
    drawn = zip(rng.integers(len(RANKS), size=DECK_SIZE), rng.integers(len(SUITS), size=DECK_SIZE), strict=True)
    return tuple(Card(RANKS[rank], SUITS[suit]) for rank, suit in drawn)


def total(hand: Sequence[Card]) -> int:
    """Returns what a hand counts: one ace is 11 where that does not go over 21."""
    return int(sum_hand(_values(hand)))


def bust(hand: Sequence[Card]) -> bool:
    """Returns whether a hand goes over 21."""
    return bool(is_bust(_values(hand)))


def player_hand(deck: Sequence[Card], hits: int) -> tuple[Card, ...]:
    """Returns the player's cards after some hits."""
    return tuple(deck[2 : 4 + hits])


def dealer_hand(deck: Sequence[Card], hits: int) -> tuple[Card, ...]:
    """Returns the dealer's cards at the end of a hand: drawn after the player's hits, up to 17 or more."""
    drawn = 4 + hits
    while total((*deck[:2], *deck[4 + hits : drawn])) < DEALER_STANDS_AT:
        drawn += 1
    return (*deck[:2], *deck[4 + hits : drawn])


def settled(deck: Sequence[Card], hits: int) -> int:
    """Returns the result of standing after some hits: 1 won, 0 a draw, -1 lost; a bust is lost.

    Ace and ten dealt as the first two cards win unless the dealer has them too (`sab` of gymnasium's rules).
    """
    player = _values(player_hand(deck, hits))
    if is_bust(player):
        return -1
    dealer = _values(dealer_hand(deck, hits))
    if is_natural(player) and not is_natural(dealer):
        return 1
    return int(cmp(score(player), score(dealer)))


def _values(hand: Sequence[Card]) -> list[int]:
    return [card.value for card in hand]
