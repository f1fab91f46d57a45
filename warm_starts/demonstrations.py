"""Demonstrations for supervised fine-tuning: noisy experts play the environments.

The warm start is meant to be weak: with probability `noise` a demonstrated action is a random
admissible one. What the responses read and state is always right, so that fine-tuning with a GFlowNet
loss has only the choice of actions left to learn.

With probability `detours` another action is played than the one that is demonstrated, so that the expert shows
what to do where it would never have gone: an expert that knows where a thing is only ever comes to places that
hold it, and who learns from it takes things that are not there.
"""

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.learner.sft import ExampleSource, SftExample
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.instances import DEMONSTRATION_SEEDS
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import TaskSettings
from gflowvlm.shared.trajectory import Trajectory

_BLOCK_BATCHES = 16


@dataclass(frozen=True)
class InstanceSource:
    """Instances that a share of the demonstrations is played on.

    Attributes:
        settings: The task's settings.
        split: ``id`` or ``ood``.
        share: Share of all examples.
    """

    settings: TaskSettings
    split: str
    share: float


def instance_sources(settings: TaskSettings, out_of_distribution: bool) -> list[InstanceSource]:
    """Returns the instances that demonstrations of a task are played on.

    Args:
        settings: The task's settings.
        out_of_distribution: Also teach to read what out-of-distribution play shows: the ``ood`` split and what
            `reading_source` shows.
    """
    if not out_of_distribution:
        return [InstanceSource(settings, "id", 1.0)]
    return [
        InstanceSource(settings, "id", 0.4),
        InstanceSource(settings, "ood", 0.4),
        reading_source(settings, True, share=0.2),
    ]


def reading_source(settings: TaskSettings, out_of_distribution: bool, share: float = 1.0) -> InstanceSource:
    """Returns the instances that reading is learned best from; out of distribution the task's own settings for it."""
    if not out_of_distribution:
        return InstanceSource(settings, "id", share)
    return InstanceSource(settings.for_reading(), "ood", share)


class Demonstrations:
    """Batches of demonstrated responses, a function of seed and step alone.

    Episodes are played in blocks of several batches; the states of all episodes of a block are shuffled,
    so that a batch is not a handful of episodes.
    """

    def __init__(
        self,
        sources: Sequence[InstanceSource],
        noise: float,
        with_done: bool,
        seed: int,
        reading: InstanceSource | None = None,
        reading_steps: int = 0,
        detours: float = 0.0,
    ) -> None:
        """Sets the demonstrations up.

        Args:
            sources: Where to play; the shares add up to 1.
            noise: Probability that an action is a random admissible one.
            with_done: Whether the stop action is demonstrated; without it episodes end on the target.
            seed: Fixes all demonstrations.
            reading: Where the first steps are played, with the prompt left out: a policy with random weights
                learns to read much faster from short sequences whose two numbers are independent.
            reading_steps: About how many steps (whole blocks) that lasts.
            detours: Probability that another admissible action, at random, is played than the demonstrated one.
        """
        self._environments = [(make_env(source.settings), source) for source in sources]
        self._reading = None if reading is None else (make_env(reading.settings), reading)
        self._reading_blocks = round(reading_steps / _BLOCK_BATCHES)
        self._noise = noise
        self._with_done = with_done
        self._detours = detours
        self._seed = seed
        self._block = lru_cache(maxsize=1)(self._play_block)

    @property
    def reading_steps(self) -> int:
        """How many steps teach reading only."""
        return 0 if self._reading is None else self._reading_blocks * _BLOCK_BATCHES

    def batch(self, step: int, size: int) -> list[SftExample]:
        """Returns the examples of a step; the same ones at every call."""
        block, position = divmod(step, _BLOCK_BATCHES)
        return self._block(block, size)[position * size : (position + 1) * size]

    def _play_block(self, block: int, size: int) -> list[SftExample]:
        rng = np.random.default_rng([self._seed, block])
        wanted = size * _BLOCK_BATCHES
        if self._reading is not None and block < self._reading_blocks:
            environment, source = self._reading
            examples = [replace(e, prompt="") for e in self._play(environment, source.split, wanted, rng)]
            random.Random(int(rng.integers(2**31))).shuffle(examples)
            return examples
        examples = []
        for number, (environment, source) in enumerate(self._environments):
            last = number == len(self._environments) - 1
            count = wanted - len(examples) if last else round(wanted * source.share)
            examples += self._play(environment, source.split, count, rng)
        random.Random(int(rng.integers(2**31))).shuffle(examples)
        return examples

    def _play(self, environment: TaskEnv, split: str, count: int, rng: np.random.Generator) -> list[SftExample]:
        examples: list[SftExample] = []
        while len(examples) < count:
            seed = DEMONSTRATION_SEEDS[int(rng.integers(len(DEMONSTRATION_SEEDS)))]
            environment.reset(seed=seed, options={"split": split})
            while environment.end is None:
                action = self._action(environment, rng)
                if action is None:
                    break
                examples.append(
                    SftExample(environment.prompt(), environment.shown(), environment.demonstration(action, rng))
                )
                environment.step(self._played(environment, action, rng))
        return examples[:count]

    def _action(self, environment: TaskEnv, rng: np.random.Generator) -> str | None:
        """Returns the demonstrated action, or None where the expert would stop and must not."""
        expert = environment.expert_action()
        if not self._with_done and expert == DONE_TOKEN:
            return None
        if rng.random() >= self._noise:
            return expert
        return _random_action(environment, rng, () if self._with_done else (DONE_TOKEN,)) or expert

    def _played(self, environment: TaskEnv, demonstrated: str, rng: np.random.Generator) -> str:
        """Returns what is played after an action was demonstrated: that, or a detour, which never stops."""
        if self._detours == 0 or rng.random() >= self._detours:
            return demonstrated
        return _random_action(environment, rng, (DONE_TOKEN, demonstrated)) or demonstrated


def _random_action(environment: TaskEnv, rng: np.random.Generator, but: Collection[str]) -> str | None:
    """Returns a random admissible action that is none of some; None where there is none."""
    choices = [action for action in environment.admissible_actions if action not in but]
    return choices[int(rng.integers(len(choices)))] if choices else None


class RepeatedExamples:
    """The examples of the first steps, and then these again and again, shuffled anew each time.

    Where playing costs more than learning does, as in ALFWorld.
    """

    def __init__(self, source: ExampleSource, fresh_steps: int, once: int = 0) -> None:
        """Sets the repetition up.

        Args:
            source: Where the examples of the first steps come from.
            fresh_steps: How many steps these are.
            once: How many of them, from the first on, are not repeated.
        """
        self._source = source
        self._fresh_steps = fresh_steps
        self._once = once
        self._kept: dict[int, list[SftExample]] = {}

    def batch(self, step: int, size: int) -> list[SftExample]:
        """Returns the examples of a step; the same ones at every call."""
        if step < self._fresh_steps:
            return self._fresh(step, size)
        repetition, position = divmod(step - self._once, self._fresh_steps - self._once)
        repeated = range(self._once, self._fresh_steps)
        examples = [example for fresh in repeated for example in self._fresh(fresh, size)]
        order = np.random.default_rng(repetition).permutation(len(examples))
        return [examples[index] for index in order[position * size : (position + 1) * size]]

    def _fresh(self, step: int, size: int) -> list[SftExample]:
        if step not in self._kept:
            self._kept[step] = list(self._source.batch(step, size))
        return self._kept[step]


class RecordedExamples:
    """The responses of recorded trajectories, in another order in each pass."""

    def __init__(self, trajectories: Iterable[Trajectory], with_done: bool, seed: int) -> None:
        """Takes the responses over.

        Args:
            trajectories: Where they stand.
            with_done: Whether responses that stop are among them.
            seed: Fixes the order.

        Raises:
            UserError: There are none.
        """
        self._examples = [
            SftExample(step.prompt, trajectory.images[step.image], step.response_text)
            for trajectory in trajectories
            for step in trajectory.steps
            if with_done or step.action != DONE_TOKEN
        ]
        if len(self._examples) == 0:
            raise UserError("--demonstrations: no response in them is to be learned; demonstrate [DONE], too")
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self._seed = seed

    def batch(self, step: int, size: int) -> list[SftExample]:
        """Returns the examples of a step; the same ones at every call. A batch may reach into the next pass."""
        positions = (divmod(number, len(self._examples)) for number in range(step * size, (step + 1) * size))
        return [self._examples[self._order(repetition)[position]] for repetition, position in positions]

    def _shuffled(self, repetition: int) -> list[int]:
        return [int(i) for i in np.random.default_rng([self._seed, repetition]).permutation(len(self._examples))]
