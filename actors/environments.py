"""Environments as episodes play them: in the rollout worker's own process, or in one that may die.

An environment's code is not this project's: it may raise anything, exit, give back nonsense, or never return.
Whatever it does becomes an `EnvironmentFailedError` that says which instance it was and why.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

import numpy as np

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.task_settings import TaskSettings
from gflowvlm.shared.trajectory import EndReason
from gflowvlm.shared.user_code import call_guarded

log = logging.getLogger(__name__)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

REASON_CHARS = 300
"""The most characters of an error's text that a reason quotes."""


class EnvironmentFailedError(UserError):
    """An environment's own code failed: it raised, exited, ended its process, or did not return in time.

    The message is one line: the instance, the file it is read from where there is one, and the reason.
    """


class EnvironmentLostError(RuntimeError):
    """The process that an environment lived in is gone, and not by what this environment did."""


@dataclass(frozen=True)
class View:
    """What an episode sees of its environment. Travels between processes.

    Attributes:
        task: Name of the task.
        instance_id: Id of the instance.
        prompt: Text for the policy; empty once the episode has ended.
        image: The picture as PNG; empty once the episode has ended.
        admissible_actions: The actions of the moment.
        log_reward: log R of stopping here, nats.
        reward: The task's own reward of the last transition.
        end: Why the episode ended, None while it goes on.
        success: Whether it ended in a state that solves the task.
        outcome: Name of the outcome of stopping here.
    """

    task: str
    instance_id: str
    prompt: str
    image: bytes
    admissible_actions: list[str]
    log_reward: float
    reward: float
    end: EndReason | None
    success: bool
    outcome: str


class EpisodeEnvironment(Protocol):
    """One environment, wherever it is."""

    async def start(self, seed: int, split: str, wording: Sequence[int]) -> View:
        """Starts the instance of a seed; `wording` seeds the choice among an expert's wordings."""

    async def act(self, action: str) -> View:
        """Takes an action."""

    async def demonstration(self) -> str:
        """Returns the expert's response at the current state."""

    def close(self) -> None:
        """Lets the environment go; calls that still run are not waited for."""


def failure_reason(error: BaseException) -> str:
    """Returns what went wrong as one line; never raises, whatever the error is."""
    name = type(error).__name__
    try:
        text = one_line(error, REASON_CHARS)
    except BaseException:  # noqa: BLE001 - the text of a stranger's exception is a stranger's code
        return name
    if isinstance(error, UserError):
        return text
    return f"{name}: {text}" if text else name


def run_environment_code(
    call: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """Returns what a call of an environment's code returns.

    Raises:
        EnvironmentFailedError: It raised, whatever that was: `SystemExit` would end the event loop that plays all
            other episodes.
        KeyboardInterrupt: The user pressed Ctrl-C in the main thread.
    """
    return call_guarded(call, lambda error: EnvironmentFailedError(failure_reason(error)), *args, **kwargs)


def make_environment(settings: TaskSettings) -> TaskEnv:
    """Returns a new environment of a task.

    Raises:
        UserError: Its settings allow none.
        EnvironmentFailedError: Its code failed.
    """
    try:
        return run_environment_code(make_env, settings)
    except EnvironmentFailedError as failed:
        if isinstance(failed.__cause__, UserError):
            raise failed.__cause__ from None
        raise


class InstanceSlot:
    """An environment and the view of it."""

    def __init__(self, env: TaskEnv) -> None:
        self.env = env
        self._wording = np.random.default_rng(0)

    def name_of(self, seed: int, split: str) -> str:
        """Returns what an instance is called when it fails: its id, and the file it is read from."""
        source = self.env.source(seed, split)
        name = instance_name(self.env.task, split, seed)
        return name if source is None else f"{name} ({source})"

    def start(self, seed: int, split: str, wording: Sequence[int]) -> View:
        """See `EpisodeEnvironment.start`."""
        self.env.reset(seed=seed, options={"split": split})
        self._wording = np.random.default_rng(list(wording))
        return self._view(0.0)

    def act(self, action: str) -> View:
        """See `EpisodeEnvironment.act`."""
        return self._view(self.env.advance(action))

    def demonstration(self) -> str:
        """See `EpisodeEnvironment.demonstration`."""
        return _text(self.env.demonstration(self.env.expert_action(), self._wording))

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _view(self, reward: float) -> View:
        env, ended = self.env, self.env.end is not None
        log_reward, reward = float(env.log_reward), float(reward)
        if not (math.isfinite(log_reward) and math.isfinite(reward)):
            raise ValueError(f"log reward {log_reward} and reward {reward} must be finite")
        return View(
            task=env.task,
            instance_id=env.instance_id,
            prompt="" if ended else _text(env.prompt()),
            image=b"" if ended else bytes(env.shown()),
            admissible_actions=[_text(action) for action in env.admissible_actions],
            log_reward=log_reward,
            reward=reward,
            end=env.end,
            success=bool(env.success),
            outcome=_text(env.outcome),
        )


def instance_name(task: str, split: str, seed: int) -> str:
    """Returns an instance's id: ``task/split/seed``."""
    return f"{task}/{split}/{seed}"


def _text(value: str) -> str:
    """Returns a plain string; raises ValueError for one that no file and no tokenizer takes (lone surrogates)."""
    return str(value).encode().decode()


class LocalCalls:
    """Which instance's code runs in this process at the moment, for whoever finds that it does not return.

    Attributes:
        running: Split and seed of the instance and its name, None while no environment's code runs.
    """

    def __init__(self) -> None:
        self.running: tuple[str, int, str] | None = None


class LocalEnvironment:
    """An environment in this process, for tasks whose steps take less time than a trip to another process.

    Its exceptions fail its own episode alone, `SystemExit` included. What ends or blocks the process cannot be held
    off here: that takes a process of its own (``rollout.environment_processes``).

    Args:
        env: The environment.
        calls: Is told which instance's code runs.
    """

    def __init__(self, env: TaskEnv, calls: LocalCalls | None = None) -> None:
        self._slot = InstanceSlot(env)
        self._calls = LocalCalls() if calls is None else calls
        self._instance = ("", 0, env.task)

    async def start(self, seed: int, split: str, wording: Sequence[int]) -> View:
        """See `EpisodeEnvironment.start`."""
        self._instance = (split, seed, instance_name(self._slot.env.task, split, seed))
        self._instance = (split, seed, self._call(self._slot.name_of, seed, split))
        return self._call(self._slot.start, seed, split, wording)

    async def act(self, action: str) -> View:
        """See `EpisodeEnvironment.act`."""
        view = self._call(self._slot.act, action)
        # Others have their turn after every step, also when no response has to be waited for.
        await asyncio.sleep(0)
        return view

    async def demonstration(self) -> str:
        """See `EpisodeEnvironment.demonstration`."""
        return self._call(self._slot.demonstration)

    def close(self) -> None:
        """See `EpisodeEnvironment.close`; that it cannot be closed is no reason to lose what was played."""
        try:
            self._call(self._slot.close)
        except EnvironmentFailedError as error:
            log.warning("%s (while it was closed)", error)

    def _call(self, call: Callable[..., _Result], *arguments: object) -> _Result:
        self._calls.running = self._instance
        try:
            return run_environment_code(call, *arguments)
        except EnvironmentFailedError as error:
            raise EnvironmentFailedError(f"{self._instance[2]}: {error}") from None
        finally:
            self._calls.running = None
