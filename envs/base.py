"""What every task is: a gymnasium environment whose actions are text and whose episodes follow one protocol.

The protocol, the same for every task: an admissible action makes a transition, after which the environment
may end the episode, `[DONE]` ends it where it stands, anything else ends it at the reward floor, and the step
limit cuts it off. Actions come from a model and are therefore untrusted: no string raises.
"""

import copy
import io
import string
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Text
from numpy.typing import NDArray
from PIL import Image

from gflowvlm.shared.answer_formats import FieldType, answer_format
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.lexicon import Lexicon
from gflowvlm.shared.pictures import join_pictures
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import TaskSettings
from gflowvlm.shared.trajectory import EndReason

SPLITS = ("id", "ood")
"""In distribution, out of distribution."""

INVALID_OUTCOME = "invalid"
"""The outcome of every episode that ends in an invalid response."""

CUT_OUTCOME = "cut off"
"""The outcome of every episode that a limit of tokens cuts off (`EndReason.by_token_limit`)."""

MAX_ACTION_CHARS = 256


class Leaf(NamedTuple):
    """A terminal object of the tree of action sequences: what one of them comes to.

    Attributes:
        outcome: Name of its outcome.
        solved: Whether it solves the task.
        log_reward: log R, nats, before the exponent β.
    """

    outcome: str
    solved: bool
    log_reward: float


class Reading(NamedTuple):
    """What a right answer says of a state, whatever action it gives.

    Attributes:
        fields: By name, in the order of `TaskEnv.answer_fields`.
        thoughts: The chain of thought, once for each wording.
    """

    fields: Mapping[str, str | int]
    thoughts: list[str]


class TaskEnv(gymnasium.Env, ABC):
    """One task, one episode at a time.

    The observation is the current picture, RGB uint8 of shape (image_size, image_size, 3). The action is
    the text of the parsed action; a malformed response is stepped as ``""``. The reward of `step` is the
    task's own (the PPO baseline's); the GFlowNet reward is `log_reward`.

    Attributes:
        log_reward_floor: log R of the worst outcome, nats; an episode that ends in an invalid response gets it.
        goal: First line of the prompt: what is to be done, and what the actions mean.
        answer_fields: What an answer says besides thoughts and action: names and types, in order.
        answer_format: How answers are written and read.
        settings: The task's settings.
        max_steps: Transitions after which the episode is cut off.
        split: ``id`` or ``ood``.
        instance_seed: Seed that, with the split, fixes the instance and its pictures.
        end: Why the episode ended, None while it goes on.
        past_actions: The actions of the transitions made so far, stop and invalid ones left out.
    """

    log_reward_floor: ClassVar[float] = 0.0
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 2}
    goal: str
    answer_fields: ClassVar[Mapping[str, FieldType]] = {}
    settings: TaskSettings

    def __init__(self, settings: TaskSettings, render_mode: str | None = None) -> None:
        self.settings = settings
        self.answer_format = answer_format(settings.answer_format)
        self.image_size = settings.image_size
        self.max_steps = settings.max_steps
        self.observation_space = Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
        self.action_space = Text(max_length=MAX_ACTION_CHARS, min_length=0, charset=string.printable)
        self.render_mode = render_mode
        self.split = SPLITS[0]
        self.instance_seed: int | None = None
        self.end: EndReason | None = None
        self.past_actions: list[str] = []
        self._past_states: list[str] = []
        self._picture: Image.Image | None = None
        self._past_pictures: list[bytes] = []
        self._leaves: list[Leaf] | None = None

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
        self._leaves = None
        self._past_pictures = []
        self._begin()
        return self._observation(), self._info()

    def step(self, action: str) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Takes one action; see the module for the protocol.

        Raises:
            gymnasium.error.ResetNeeded: The episode has ended, or none was started.
        """
        reward = self.advance(action)
        truncated = self.end is EndReason.STEP_LIMIT
        terminated = self.end is not None and not truncated
        return self._observation(), reward, terminated, truncated, self._info()

    def advance(self, action: str) -> float:
        """Takes one action as `step` does and returns the original reward.

        Draws nothing, unless past pictures are shown (``task.pictures``): that of the state that it leaves then.

        Raises:
            gymnasium.error.ResetNeeded: The episode has ended, or none was started.
        """
        if self.instance_seed is None or self.end is not None:
            raise gymnasium.error.ResetNeeded("the episode has ended or was never started; call reset() first")
        if action not in self.admissible_actions:
            self.end = EndReason.INVALID
        elif action == DONE_TOKEN:
            self.end = EndReason.DONE
        if self.end is not None:
            return self._apply(None)
        self._past_states.append(self._state_text())
        if self.settings.pictures > 1:
            self._past_pictures.append(self.image_png())
        self.past_actions.append(action)
        self._picture = None
        reward = self._apply(action)
        if self._over():
            self.end = EndReason.ENVIRONMENT
        elif len(self.past_actions) == self.max_steps:
            self.end = EndReason.STEP_LIMIT
        return reward

    def branch(self) -> Self:
        """Returns a copy that can go on differently.

        Right for tasks that keep the state of an episode in immutable values and lists; only those have a tree
        that can be walked.
        """
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(other, name, value.copy())
        return other

    def render(self) -> NDArray[np.uint8] | None:
        """Returns the current picture as an array when the render mode is ``rgb_array``."""
        return self._observation() if self.render_mode == "rgb_array" else None

    def image_png(self) -> bytes:
        """Returns the current picture as PNG: the same bytes for the same instance and state."""
        buffer = io.BytesIO()
        self.picture().save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def shown(self) -> bytes:
        """Returns what the policy is shown: the pictures of the last ``task.pictures`` states (`shared.pictures`)."""
        past = self._past_pictures[-(self.settings.pictures - 1) :] if self.settings.pictures > 1 else []
        return join_pictures([*past, self.image_png()])

    def picture(self) -> Image.Image:
        """Returns the current picture, drawn at the first call."""
        if self._picture is None:
            # The picture's noise is a function of instance and step, never of how the environment was used.
            self._picture = self._draw(self._rng(2, len(self.past_actions)))
        return self._picture

    def picture_words(self) -> list[str]:
        """Returns the words and numbers that tell states apart in the current picture, in reading order.

        Empty where pictures hold none. `gflowvlm make-model` teaches a new vision tower to read them.
        """
        return []

    @property
    def instance_id(self) -> str:
        """``task/split/seed``: everything that fixes the partition function Z(g)."""
        return f"{self.task}/{self.split}/{self.instance_seed}"

    @property
    def log_reward(self) -> float:
        """log R of stopping at the current state, nats, floored, before the exponent β."""
        if self.end is EndReason.INVALID:
            return self.log_reward_floor
        return max(self.log_reward_floor, self._state_log_reward())

    @property
    def success(self) -> bool:
        """Whether the episode has ended, validly, in a state that solves the task."""
        return self.end is not None and self.end is not EndReason.INVALID and self._solved()

    @property
    def outcome(self) -> str:
        """Name of the outcome if the episode ended here; `INVALID_OUTCOME` after an invalid response."""
        return INVALID_OUTCOME if self.end is EndReason.INVALID else self._state_outcome()

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.settings.name

    @property
    def answer(self) -> str:
        """Last line of the prompt: what an answer looks like."""
        return self.answer_format.instruction(self.answer_fields)

    @property
    @abstractmethod
    def admissible_actions(self) -> list[str]:
        """The actions of the moment, `[DONE]` included."""

    def category(self, seed: int, split: str) -> str | None:
        """Returns which kind of task the instance of a seed is, None where all are of one kind."""
        return None

    def source(self, seed: int, split: str) -> str | None:
        """Returns the file that the instance of a seed is read from, None where a seed is all there is to it."""
        return None

    def prompt(self) -> str:
        """Returns the text that goes with the current picture, with or without history as the settings say.

        Past states stand there as text, because only the current picture is shown; the current state does not.
        """
        states = ["State: picture"]
        if self.settings.prompt == "history":
            past = zip(self._past_states, self.past_actions, strict=True)
            states = [f"State {t}: {state} Action {t}: {action}" for t, (state, action) in enumerate(past)]
            states.append(f"State {len(states)}: picture")
        return "\n".join([self.goal, *states, "Actions: " + " ".join(self.admissible_actions), self.answer])

    @abstractmethod
    def expert_action(self) -> str:
        """Returns what the expert does at the current state."""

    def demonstration(self, action: str, rng: np.random.Generator) -> str:
        """Returns one of `demonstrations`.

        Args:
            action: The action, not necessarily the expert's.
            rng: Chooses the wording of the thoughts.
        """
        choices = self.demonstrations(action)
        return choices[int(rng.integers(len(choices)))]

    def demonstrations(self, action: str) -> list[str]:
        """Returns responses that read the current state rightly and take an action, one for each wording.

        Whatever the action, what comes before it is the same: it tells about the state and leaves the choice
        open. Otherwise log P(action | thoughts) would be about 0 and carry no signal.
        """
        fields, thoughts = self.reading()
        return [self.answer_format.render(action, thought, fields) for thought in thoughts]

    @abstractmethod
    def reading(self) -> Reading:
        """Returns what a right answer says of the current state."""

    @classmethod
    def lexicon(cls) -> Lexicon | None:
        """Returns the words of a task whose actions are copied from the prompt, for the tokenizer of a tiny policy.

        None where a tokenizer made of `TaskSettings.tokenizer_texts` is enough.

        Raises:
            UserError: What the words come from is not installed.
        """
        return None

    def target_distribution(self, reward_exponent: float) -> dict[str, float] | None:
        """Returns the exact R^β/Z over the outcomes of the current instance, None without `TaskSettings.exact_target`.

        Terminal objects are action sequences (a tree, P_B = 1); the step limit counts as a forced stop.
        Only admissible actions are in the tree, so `INVALID_OUTCOME` has no mass and is left out. Here the
        whole tree is walked; a task whose tree is large has its own way.
        """
        if not self.settings.exact_target:
            return None
        mass: dict[str, float] = defaultdict(float)
        for leaf, probability in self._weighted_leaves(reward_exponent):
            mass[leaf.outcome] += probability
        return dict(mass)

    def target_success(self, reward_exponent: float) -> float | None:
        """Returns the success probability of a perfect sampler of R^β/Z on the current instance.

        None without `TaskSettings.exact_target`.
        """
        if not self.settings.exact_target:
            return None
        return sum(probability for leaf, probability in self._weighted_leaves(reward_exponent) if leaf.solved)

    @abstractmethod
    def _start(self, rng: np.random.Generator) -> None:
        """Sets the task's own state up for a new instance."""

    @abstractmethod
    def _apply(self, action: str | None) -> float:
        """Makes a transition (None: the episode ended without one) and returns the original reward."""

    def _over(self) -> bool:
        """Returns whether the environment ends the episode at the current state; for most tasks it never does."""
        return False

    @abstractmethod
    def _state_text(self) -> str:
        """Returns the current state as the histories of later prompts tell it."""

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

    def _begin(self) -> None:
        """Goes to the first state of the current instance."""
        self.end = None
        self.past_actions = []
        self._past_states = []
        self._picture = None
        self._start(self._rng(1))

    def _rng(self, *key: int) -> np.random.Generator:
        """Returns a generator that is a function of the instance and a key, never of how the environment was used."""
        return np.random.default_rng([self.instance_seed or 0, key[0], SPLITS.index(self.split), *key[1:]])

    def _weighted_leaves(self, reward_exponent: float) -> Iterator[tuple[Leaf, float]]:
        """Yields every leaf of the current instance's tree with its probability under R^β/Z."""
        if self._leaves is None:
            root = self.branch()
            root._begin()
            self._leaves = list(root._leaves_below())
        log_weights = reward_exponent * np.array([leaf.log_reward for leaf in self._leaves])
        weights = np.exp(log_weights - log_weights.max())
        yield from zip(self._leaves, (weights / weights.sum()).tolist(), strict=True)

    def _leaves_below(self) -> Iterator[Leaf]:
        """Yields the leaves of the tree below the current state."""
        if self.end is not None:
            yield Leaf(self.outcome, self.success, self.log_reward)
            return
        for action in self.admissible_actions:
            after = self.branch()
            after.advance(action)
            yield from after._leaves_below()

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
