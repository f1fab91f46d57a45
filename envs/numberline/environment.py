"""The NumberLine environment."""

import numpy as np
from PIL import Image

from gflowvlm.envs.base import Reading, TaskEnv
from gflowvlm.envs.numberline import prompts, rendering, target
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason


class NumberLineEnv(TaskEnv):
    """Walk from a start number to a target number by ``+`` and ``-``, then stop by ``[DONE]``.

    In distribution the numbers are 0..n_max; out of distribution they are ood_low..ood_high with start
    and target at most ood_max_distance apart. Start and target always differ. A move past either end of
    the range is admissible and changes nothing.

    The original reward is 1 for a move or stop on the target, 0 for a move that gets closer to it, else -1
    (invalid responses included).

    Attributes:
        start: The first number.
        target: The number to reach.
        current: The number of the current state.
    """

    goal = prompts.GOAL
    answer_fields = prompts.FIELDS
    settings: NumberLineSettings

    def __init__(self, settings: NumberLineSettings | None = None, render_mode: str | None = None) -> None:
        super().__init__(settings if settings is not None else NumberLineSettings(), render_mode)
        self.start = self.target = self.current = 0

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest number of the current split."""
        if self.split == "ood":
            return self.settings.ood_low, self.settings.ood_high
        return 0, self.settings.n_max

    @property
    def admissible_actions(self) -> list[str]:
        """``+``, ``-`` and ``[DONE]``, at every state."""
        return ["+", "-", DONE_TOKEN]

    def expert_action(self) -> str:
        """Returns the move towards the target, `[DONE]` on it."""
        if self.current == self.target:
            return DONE_TOKEN
        return "+" if self.current < self.target else "-"

    def reading(self) -> Reading:
        """Returns both numbers, and their relation in several wordings."""
        return prompts.reading(self.current, self.target)

    def picture_words(self) -> list[str]:
        """Returns the target number and, below it, the current one."""
        return [str(self.target), str(self.current)]

    def target_distribution(self, reward_exponent: float) -> dict[str, float]:
        """Returns the exact R^β/Z over end numbers of the current instance, whatever the current state."""
        low, high = self.bounds
        walks = target.walks_by_end(self.start, low, high, self.max_steps)
        return target.outcome_distribution(walks, low, self.target, reward_exponent)

    def target_success(self, reward_exponent: float) -> float:
        """Returns the mass of R^β/Z on the target number (0 where it is out of reach)."""
        return self.target_distribution(reward_exponent).get(str(self.target), 0.0)

    def _start(self, rng: np.random.Generator) -> None:
        low, high = self.bounds
        self.start = int(rng.integers(low, high + 1))
        reach = self.settings.ood_max_distance if self.split == "ood" else high - low
        choices = [n for n in range(low, high + 1) if n != self.start and abs(n - self.start) <= reach]
        self.target = choices[int(rng.integers(len(choices)))]
        self.current = self.start

    def _apply(self, action: str | None) -> float:
        before = self.current
        if action is not None:
            low, high = self.bounds
            self.current = min(max(before + (1 if action == "+" else -1), low), high)
        if self._solved() and self.end is not EndReason.INVALID:
            return 1.0
        return 0.0 if abs(self.current - self.target) < abs(before - self.target) else -1.0

    def _draw(self, rng: np.random.Generator) -> Image.Image:
        return rendering.draw(self.target, self.current, self.image_size, rng)

    def _state_log_reward(self) -> float:
        return target.log_reward(self.current, self.target)

    def _state_text(self) -> str:
        return str(self.current)

    def _state_outcome(self) -> str:
        return str(self.current)

    def _solved(self) -> bool:
        return self.current == self.target
