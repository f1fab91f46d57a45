"""The NumberSequence environment."""

import math

import numpy as np
from PIL import Image

from gflowvlm.envs.base import Reading, TaskEnv
from gflowvlm.envs.numbersequence import prompts, rendering, sequences
from gflowvlm.envs.numbersequence.settings import NumberSequenceSettings
from gflowvlm.shared.response import DONE_TOKEN

LOG_REWARD = math.log(100.0)
"""log R of a right continuation, nats; everything else is at the floor, R = 1."""


class NumberSequenceEnv(TaskEnv):
    """Continue a sequence of three numbers by the missing ones, then stop by ``[DONE]``.

    A continuation is right when the whole sequence obeys one rule: arithmetic, or every number the sum of the two
    before (GFlowVLM's motivating experiment). Some prefixes obey both: 1, 2, 3 goes on by 4 or by 5. In distribution
    starts and steps are 1..n_max, out of distribution ood_low..ood_high.

    The admissible numbers are few and change with the state; a next number by either rule is among them. A wrong
    number, or one too many, ends the episode at the floor. So a solved episode is a right continuation and a
    ``[DONE]``: Div@N counts different right continuations.

    The original reward is 1 for ``[DONE]`` after a right continuation, else 0.

    Attributes:
        prefix: The numbers that are given.
        appended: The numbers that were chosen.
    """

    goal = prompts.GOAL
    answer_fields = prompts.FIELDS
    settings: NumberSequenceSettings

    def __init__(self, settings: NumberSequenceSettings | None = None, render_mode: str | None = None) -> None:
        super().__init__(settings if settings is not None else NumberSequenceSettings(), render_mode)
        self.prefix: tuple[int, ...] = ()
        self.appended: list[int] = []

    @property
    def numbers(self) -> tuple[int, ...]:
        """The sequence so far."""
        return (*self.prefix, *self.appended)

    @property
    def missing(self) -> int:
        """How many numbers are still missing."""
        return max(0, self.settings.continuation - len(self.appended))

    @property
    def admissible_actions(self) -> list[str]:
        """Some numbers in ascending order, and ``[DONE]``."""
        numbers = sequences.candidates(self.numbers, self.settings.choices, self._rng(4, *self.numbers))
        return [*(str(number) for number in numbers), DONE_TOKEN]

    def expert_action(self) -> str:
        """Returns the next number by one of the rules that fit, `[DONE]` when none is missing or no rule fits.

        Where both rules fit, the instance decides which one it is: either, with equal probability.
        """
        following = list(sequences.next_by_rule(self.numbers).values())
        if self.missing == 0 or len(following) == 0:
            return DONE_TOKEN
        return str(following[int(self._rng(5).integers(len(following)))])

    def reading(self) -> Reading:
        """Returns the sequence, and which rules fit."""
        return prompts.reading(self.numbers, self.missing, sequences.next_by_rule(self.numbers))

    def picture_words(self) -> list[str]:
        """Returns the numbers so far, and a question mark for each that is missing."""
        return [*(str(number) for number in self.numbers), *["?"] * self.missing]

    def _start(self, rng: np.random.Generator) -> None:
        low, high = (self.settings.ood_low, self.settings.ood_high) if self.split == "ood" else (1, self.settings.n_max)
        self.prefix = sequences.draw_prefix(rng, low, high, self.settings.ambiguous_share)
        self.appended = []

    def _apply(self, action: str | None) -> float:
        if action is not None:
            self.appended.append(int(action))
            return 0.0
        return float(self.success)

    def _over(self) -> bool:
        return not self._right or len(self.appended) > self.settings.continuation

    def _draw(self, rng: np.random.Generator) -> Image.Image:
        return rendering.draw(self.numbers, self.missing, self.image_size, rng)

    def _state_text(self) -> str:
        return prompts.sequence_text(self.numbers)

    def _state_log_reward(self) -> float:
        return LOG_REWARD if self._solved() else self.log_reward_floor

    def _state_outcome(self) -> str:
        if self._solved():
            return prompts.sequence_text(self.appended)
        return "wrong" if self._over() else "unfinished"

    def _solved(self) -> bool:
        return self._right and len(self.appended) == self.settings.continuation

    @property
    def _right(self) -> bool:
        """Whether all numbers so far obey one rule."""
        return len(sequences.next_by_rule(self.numbers)) > 0
