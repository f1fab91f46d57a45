"""Blackjack: beat the dealer without going over 21, the cards read from a picture."""
