"""What every task is: a gymnasium environment whose actions are text and whose episodes follow one protocol.

The protocol, the same for every task: an admissible action makes a transition, `[DONE]` ends the episode
where it stands, anything else ends it at the reward floor, and the step limit cuts it off. Actions come
from a model and are therefore untrusted: no string raises.
"""

import io
import string
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Text
from numpy.typing import NDArray
from PIL import Image

from shared.errors import UserError
from shared.response import DONE_TOKEN
from shared.trajectory import EndReason

SPLITS = ("id", "ood")
"""In distribution, out of distribution."""

LOG_REWARD_FLOOR = 0.0
"""log R of the worst outcome, nats: R = 1. An episode that ends in an invalid response gets it."""

INVALID_OUTCOME = "invalid"
"""The outcome of every episode that ends in an invalid response."""

MAX_ACTION_CHARS = 256


class TaskEnv(gymnasium.Env, ABC):
    """One task, one episode at a time.

    The observation is the current picture, RGB uint8 of shape (image_size, image_size, 3). The action is
    the text of the parsed action; a malformed response is stepped as ``""``. The reward of `step` is the
    task's own (the PPO baseline's); the GFlowNet reward is `log_reward`.

    Attributes:
        task: Name of the task.
        max_steps: Transitions after which the episode is cut off.
        split: ``id`` or ``ood``.
        instance_seed: Seed that, with the split, fixes the instance and its pictures.
        end: Why the episode ended, None while it goes on.
        past_actions: The actions of the transitions made so far, stop and invalid ones left out.
    """

    task: ClassVar[str]
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 2}

    def __init__(self, image_size: int, max_steps: int, render_mode: str | None = None) -> None:
        self.observation_space = Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = Text(max_length=MAX_ACTION_CHARS, min_length=0, charset=string.printable)
        self.image_size = image_size
        self.max_steps = max_steps
        self.render_mode = render_mode
        self.split = SPLITS[0]
        self.instance_seed: int | None = None
        self.end: EndReason | None = None
        self.past_actions: list[str] = []
        self._picture: Image.Image | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Starts the instance of a seed.

        Args:
            seed: Instance seed, at least 0; without one the next is drawn from the environment's generator.
            options: ``{"split": "id" | "ood"}``, in distribution by default.

        Raises:
            UserError: No such split.
        """
        split = (options or {}).get("split", SPLITS[0])
        if split not in SPLITS:
            raise UserError(f"split {split!r}: there is no such split; use one of {', '.join(SPLITS)}")
        super().reset(seed=seed)
        self.instance_seed = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        self.split = split
        self.end = None
        self.past_actions = []
        self._picture = None
        self._start(np.random.default_rng([self.instance_seed, 1, SPLITS.index(split)]))
        return self._observation(), self._info()

    def step(self, action: str) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Takes one action; see the module for the protocol.

        Raises:
            gymnasium.error.ResetNeeded: The episode has ended, or none was started.
        """
        if self.instance_seed is None or self.end is not None:
            raise gymnasium.error.ResetNeeded("the episode has ended or was never started; call reset() first")
        if action not in self.admissible_actions:
            self.end = EndReason.INVALID
        elif action == DONE_TOKEN:
            self.end = EndReason.DONE
        reward = self._apply(action if self.end is None else None)
        if self.end is None:
            self.past_actions.append(action)
            self._picture = None
            if len(self.past_actions) == self.max_steps:
                self.end = EndReason.STEP_LIMIT
        truncated = self.end is EndReason.STEP_LIMIT
        terminated = self.end is not None and not truncated
        return self._observation(), reward, terminated, truncated, self._info()

    def render(self) -> NDArray[np.uint8] | None:
        """Returns the current picture as an array when the render mode is ``rgb_array``."""
        return self._observation() if self.render_mode == "rgb_array" else None

    def image_png(self) -> bytes:
        """Returns the current picture as PNG: the same bytes for the same instance and state."""
        buffer = io.BytesIO()
        self.picture().save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def picture(self) -> Image.Image:
        """Returns the current picture, drawn at the first call."""
        if self._picture is None:
            # The picture's noise is a function of instance and step, never of how the environment was used.
            key = [self.instance_seed or 0, 2, SPLITS.index(self.split), len(self.past_actions)]
            self._picture = self._draw(np.random.default_rng(key))
        return self._picture

    @property
    def instance_id(self) -> str:
        """``task/split/seed``: everything that fixes the partition function Z(g)."""
        return f"{self.task}/{self.split}/{self.instance_seed}"

    @property
    def log_reward(self) -> float:
        """log R of stopping at the current state, nats, floored, before the exponent β."""
        if self.end is EndReason.INVALID:
            return LOG_REWARD_FLOOR
        return max(LOG_REWARD_FLOOR, self._state_log_reward())

    @property
    def success(self) -> bool:
        """Whether the episode has ended, validly, in a state that solves the task."""
        return self.end is not None and self.end is not EndReason.INVALID and self._solved()

    @property
    def outcome(self) -> str:
        """Name of the outcome if the episode ended here; `INVALID_OUTCOME` after an invalid response."""
        return INVALID_OUTCOME if self.end is EndReason.INVALID else self._state_outcome()

    @property
    @abstractmethod
    def admissible_actions(self) -> list[str]:
        """The actions of the moment, `[DONE]` included."""

    @abstractmethod
    def prompt(self) -> str:
        """Returns the text that goes with the current picture."""

    @abstractmethod
    def expert_action(self) -> str:
        """Returns what the expert does at the current state."""

    @abstractmethod
    def demonstration(self, action: str, rng: np.random.Generator) -> str:
        """Returns a response that takes an action at the current state.

        Args:
            action: The action, not necessarily the expert's.
            rng: Varies the wording of the thoughts.
        """

    @abstractmethod
    def demonstrations(self, action: str) -> list[str]:
        """Returns every response that `demonstration` may give for an action at the current state."""

    @abstractmethod
    def target_distribution(self, reward_exponent: float) -> dict[str, float] | None:
        """Returns the exact R^β/Z over the outcomes of the current instance, None where it cannot be had.

        Terminal objects are action sequences (a tree, P_B = 1); the step limit counts as a forced stop.
        Only admissible actions are in the tree, so `INVALID_OUTCOME` has no mass and is left out.
        """

    @abstractmethod
    def target_success(self, reward_exponent: float) -> float | None:
        """Returns the success probability of a perfect sampler of R^β/Z on the current instance."""

    @abstractmethod
    def _start(self, rng: np.random.Generator) -> None:
        """Sets the task's own state up for a new instance."""

    @abstractmethod
    def _apply(self, action: str | None) -> float:
        """Makes a transition (None: the episode ended without one) and returns the original reward."""

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> Image.Image:
        """Returns the RGB picture of the current state; `rng` varies its looks."""

    @abstractmethod
    def _state_log_reward(self) -> float:
        """Returns log R of the current state, nats."""

    @abstractmethod
    def _state_outcome(self) -> str:
        """Returns the name of the outcome of stopping at the current state."""

    @abstractmethod
    def _solved(self) -> bool:
        """Returns whether the current state solves the task."""

    def _observation(self) -> NDArray[np.uint8]:
        return np.array(self.picture(), dtype=np.uint8)

    def _info(self) -> dict[str, Any]:
        return {
            "instance_id": self.instance_id,
            "prompt": self.prompt(),
            "admissible_actions": self.admissible_actions,
            "log_reward": self.log_reward,
            "success": self.success,
            "outcome": self.outcome,
            "end": None if self.end is None else self.end.value,
        }
