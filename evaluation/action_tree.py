"""The tree of action sequences of a task instance."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gflowvlm.envs.base import TaskEnv
from gflowvlm.shared.response import DONE_TOKEN

MAX_STATES = 20_000
"""Largest tree that is expanded: states of one instance."""


@dataclass(frozen=True)
class TreeState:
    """One state z of the tree: what the policy sees there, and what stopping there is worth.

    Attributes:
        actions: The actions that lead to it.
        prompt: The task's prompt.
        image: The encoded picture.
        responses: For every admissible action but the stop, the demonstrated responses that take it.
        log_reward: log R of stopping here, nats, before the exponent.
        outcome: Name of the outcome of stopping here.
        solved: Whether stopping here solves the task.
        forced: Whether stopping is the only move (the step limit).
    """

    actions: tuple[str, ...]
    prompt: str
    image: bytes
    responses: Mapping[str, Sequence[str]]
    log_reward: float
    outcome: str
    solved: bool
    forced: bool


def tree_size(env: TaskEnv) -> int:
    """Returns how many states the tree of an instance has; counting ends beyond `MAX_STATES`.

    Where the task itself has no target distribution, its tree cannot be walked and counts as too large. `env` must
    have been reset to the instance.
    """
    if env.target_distribution(1.0) is None:
        return MAX_STATES + 1
    states, waiting = 0, [env]
    while len(waiting) > 0 and states <= MAX_STATES:
        states += 1
        waiting += _children(waiting.pop()).values()
    return states


def expand_tree(env: TaskEnv) -> list[TreeState]:
    """Returns all states of the tree of an instance, parents before children.

    Args:
        env: The environment, reset to the instance.
    """
    states: list[TreeState] = []
    waiting = deque([env])
    while waiting:
        here = waiting.popleft()
        forced = here.end is not None
        children = _children(here)
        waiting.extend(children.values())
        prompt, image = here.prompt(), here.shown()
        responses = {action: here.demonstrations(action) for action in children}
        log_reward, outcome = here.log_reward, here.outcome
        if not forced:
            here = here.branch()
            here.advance(DONE_TOKEN)
        actions = tuple(here.past_actions)
        states.append(TreeState(actions, prompt, image, responses, log_reward, outcome, here.success, forced))
    return states


def _children(env: TaskEnv) -> dict[str, TaskEnv]:
    """Returns copies of an environment after each of its moves, by move; none where stopping is forced."""
    children = {}
    if env.end is None:
        for action in env.admissible_actions:
            if action != DONE_TOKEN:
                children[action] = env.branch()
                children[action].advance(action)
    return children
