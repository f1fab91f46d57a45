"""The Blackjack environment."""

import math

import numpy as np
from PIL import Image

from gflowvlm.envs.base import Reading, TaskEnv
from gflowvlm.envs.blackjack import cards, prompts, rendering
from gflowvlm.envs.blackjack.cards import Card
from gflowvlm.envs.blackjack.settings import BlackjackSettings
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason

HIT, STAND = "hit", "stand"
REWARD_FLOOR = 1e-10
RESULTS = {1: "win", 0: "draw", -1: "lose"}


class BlackjackEnv(TaskEnv):
    """Take cards by ``hit``, end the hand by ``stand`` or by ``[DONE]``; the rules are gymnasium's `Blackjack-v1`.

    An instance is a deck. Within it everything is determined, so the balance conditions are exact; a policy sees
    the dealer's first card and its own. There is one distribution of decks: ``ood`` only draws other ones.

    Stopping at a state is standing there, so R(z⊤) = max(1e-10, 10 (r + 1)) with r = 1, 0, -1 for the hand as
    it would be settled now. ``stand`` is the move of the game: the dealer's cards are shown, and the environment ends
    the episode. ``[DONE]`` is the stop action that every state has: it settles the hand without showing it. Both
    give the same reward, so a perfect sampler chooses them equally often. (Were an unfinished hand worth a draw,
    as gymnasium's reward of 0 for every hit suggests, not to play would be the safest: a loss is 1e-10.) Going over
    21 ends the episode.

    The original reward is r at the end of the hand, 0 for a hit that does not end it, -1 for an invalid response.
    The 17-rule, the expert, wins 41.1 %, draws 10.2 % and loses 48.7 % of hands.

    Attributes:
        deck: The cards in the order they are dealt.
        hits: How many the player has taken.
        stood: Whether the player has ended the hand by ``stand``.
    """

    log_reward_floor = math.log(REWARD_FLOOR)
    goal = prompts.GOAL
    answer_fields = prompts.FIELDS
    settings: BlackjackSettings

    def __init__(self, settings: BlackjackSettings | None = None, render_mode: str | None = None) -> None:
        super().__init__(settings if settings is not None else BlackjackSettings(), render_mode)
        self.deck: tuple[Card, ...] = ()
        self.hits = 0
        self.stood = False

    @property
    def player(self) -> tuple[Card, ...]:
        """The player's cards."""
        return cards.player_hand(self.deck, self.hits)

    @property
    def result(self) -> int:
        """1, 0 or -1: what the hand comes to if the player takes no more cards."""
        return cards.settled(self.deck, self.hits)

    @property
    def admissible_actions(self) -> list[str]:
        """``stand``, ``hit`` and ``[DONE]``, at every state."""
        return [STAND, HIT, DONE_TOKEN]

    def expert_action(self) -> str:
        """Returns what the 17-rule says: ``hit`` below 17, else ``stand`` or `[DONE]`, as the instance decides.

        Either ends the hand with the same reward. Whoever learns from an expert that only stands gives `[DONE]` next to
        no probability, which the losses of state flows look at in every state; see docs/recipe.md.
        """
        if cards.total(self.player) < cards.DEALER_STANDS_AT:
            return HIT
        return (STAND, DONE_TOKEN)[int(self._rng(5).integers(2))]

    def reading(self) -> Reading:
        """Returns the cards and their total, and how it compares with 17."""
        return prompts.reading(self.deck[0], self.player)

    def picture_words(self) -> list[str]:
        """Returns what the dealer's open card counts and, below it, what the player's cards do."""
        return [card.text for card in (self.deck[0], *self.player)]

    def _start(self, rng: np.random.Generator) -> None:
        self.deck = cards.draw_deck(rng)
        self.hits = 0
        self.stood = False

    def _apply(self, action: str | None) -> float:
        if action == HIT:
            self.hits += 1
            return -1.0 if self._over() else 0.0
        self.stood = action == STAND
        return -1.0 if self.end is EndReason.INVALID else float(self.result)

    def _over(self) -> bool:
        return self.stood or cards.bust(self.player)

    def _draw(self, rng: np.random.Generator) -> Image.Image:
        dealer = cards.dealer_hand(self.deck, self.hits) if self.stood else (self.deck[0], None)
        # The open card lies on top, so that it is whole where cards overlap.
        return rendering.draw((dealer[1], dealer[0], *dealer[2:]), self.player, self.image_size)

    def _state_text(self) -> str:
        return prompts.state_text(self.deck[0], self.player)

    def _state_log_reward(self) -> float:
        return math.log(max(REWARD_FLOOR, 10.0 * (self.result + 1)))

    def _state_outcome(self) -> str:
        return "bust" if cards.bust(self.player) else f"{RESULTS[self.result]} {cards.total(self.player)}"

    def _solved(self) -> bool:
        return self.result == 1
