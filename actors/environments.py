"""Environments as episodes play them: in the rollout worker's own process, or in one that may die."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gflowvlm.envs.base import TaskEnv
from gflowvlm.shared.trajectory import EndReason


class EnvironmentLostError(RuntimeError):
    """The process that an environment lived in has died, or did not answer in time."""


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


class InstanceSlot:
    """An environment and the view of it."""

    def __init__(self, env: TaskEnv) -> None:
        self.env = env
        self._wording = np.random.default_rng(0)

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
        return self.env.demonstration(self.env.expert_action(), self._wording)

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _view(self, reward: float) -> View:
        env, ended = self.env, self.env.end is not None
        return View(
            task=env.task,
            instance_id=env.instance_id,
            prompt="" if ended else env.prompt(),
            image=b"" if ended else env.image_png(),
            admissible_actions=env.admissible_actions,
            log_reward=env.log_reward,
            reward=float(reward),
            end=env.end,
            success=env.success,
            outcome=env.outcome,
        )


class LocalEnvironment:
    """An environment in this process, for tasks whose steps take less time than a trip to another process."""

    def __init__(self, env: TaskEnv) -> None:
        self._seat = InstanceSlot(env)

    async def start(self, seed: int, split: str, wording: Sequence[int]) -> View:
        """See `EpisodeEnvironment.start`."""
        return self._seat.start(seed, split, wording)

    async def act(self, action: str) -> View:
        """See `EpisodeEnvironment.act`."""
        view = self._seat.act(action)
        # Others have their turn after every step, also when no response has to be waited for.
        await asyncio.sleep(0)
        return view

    async def demonstration(self) -> str:
        """See `EpisodeEnvironment.demonstration`."""
        return self._seat.demonstration()

    def close(self) -> None:
        """See `EpisodeEnvironment.close`."""
        self._seat.close()
