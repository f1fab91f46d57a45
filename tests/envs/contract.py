"""What the tests of several tasks share."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import default_settings, task_names, task_settings_class

TASKS = tuple(task for task in task_names() if task_settings_class(task).exact_target)
"""Tasks that keep the whole contract; one without an exact target has a smaller one, see its own tests."""

HOSTILE = (
    "",
    "\x00",
    "\ud800",
    "[DONE",
    "[done]",
    "DONE",
    "[DONE][DONE]",
    " [DONE]",
    "+ ",
    " -",
    "+-",
    "\n+",
    "＋",
    "hit ",
    "Stand",
    "ｈｉｔ",
    "٤",
    "４",
    "4.0",
    "1e1",
    "-4",
    "04",
    "9" * 5000,
    "+" * 10**6,
    "{" * 5000,
    "\x1b[2J",
    "<image>",
    "<end_of_utterance>",
    "<|im_end|>",
    '{"action": "+"}',
    "'; DROP TABLE decks; --",
    "__class__",
)
"""Actions that no task admits at any state."""


def made(task: str, **changes: object) -> TaskEnv:
    """Returns an environment of a task, with some settings changed."""
    settings = default_settings(task)
    return make_env(type(settings).model_validate({**settings.model_dump(), **changes}))


def remembered(env: TaskEnv) -> dict[str, Any]:
    """Returns copies of all that an environment remembers of its episode, without why it ended."""
    left_out = {"end", "_picture", "_leaves", "_np_random", "action_space", "observation_space"}
    return {name: repr(value) for name, value in vars(env).items() if name not in left_out}


def endings(env: TaskEnv, seed: int, split: str, actions: tuple[str, ...] = ()) -> Iterator[TaskEnv]:
    """Yields the environment at the end of every action sequence, each played from the start."""
    env.reset(seed=seed, options={"split": split})
    for action in actions:
        env.step(action)
    if env.end is not None:
        yield env
        return
    for action in list(env.admissible_actions):
        yield from endings(env, seed, split, (*actions, action))


def enumerated(env: TaskEnv, seed: int, split: str, beta: float) -> tuple[dict[str, float], float]:
    """Returns R^β/Z over outcomes, and its success, by playing every action sequence."""
    mass: Counter[str] = Counter()
    solved = 0.0
    for ended in endings(env, seed, split):
        weight = float(np.exp(beta * ended.log_reward))
        mass[ended.outcome] += weight
        solved += weight * ended.success
    total = sum(mass.values())
    return {outcome: weight / total for outcome, weight in mass.items()}, solved / total


def wild_responses(env: TaskEnv, count: int, seed: int) -> Iterator[str]:
    """Yields responses that are random, broken or hostile; some of them are valid all the same."""
    rng = random.Random(seed)
    valid = [text for action in env.admissible_actions for text in env.demonstrations(action)]
    for number in range(count):
        text = rng.choice(valid)
        place = rng.randrange(len(text))
        kind = number % 10
        if kind == 0:
            yield text[:place] + text[place + rng.randrange(1, 4) :]
        elif kind == 1:
            yield text[:place] + chr(rng.randrange(0x110000)) + text[place:]
        elif kind == 2:
            yield "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(40)))
        elif kind == 3:
            yield json.dumps({"thoughts": "x", "action": rng.choice(HOSTILE[:-10])})
        elif kind == 4:
            yield text.replace(
                '"action": "', rng.choice(['"action": ["', '"action": {"a": "', '"action": null, "b": "'])
            )
        elif kind == 5:
            depth = rng.randrange(1, 9000)
            yield '{"thoughts": ' + "[" * depth + "]" * depth + ', "action": "+"}'
        elif kind == 6:
            yield (
                text[:place] + rng.choice(["<image>", "<end_of_utterance>", DONE_TOKEN, "</s>", "\x00"]) + text[place:]
            )
        elif kind == 7:
            yield text * rng.randrange(2, 200)
        elif kind == 8:
            yield f'{{"thoughts": "x", "action": "{rng.randrange(-10, 10 ** rng.randrange(1, 30))}"}}'
        else:
            yield text + rng.choice(["", " ", "\n\n", "}", "\ufeff", "x" * 25_000])


PROBE = """
import hashlib, json, sys
import numpy as np
from tests.envs.contract import made
seen = []
for prompt in ("history", "markov"):
    env = made(sys.argv[1], prompt=prompt)
    for seed in (0, 7, 2**31 - 1):
        for split in ("id", "ood"):
            rng = np.random.default_rng(seed)
            observation, info = env.reset(seed=seed, options={"split": split})
            rewards = [env.target_distribution(2.0)]
            while env.end is None:
                texts = [env.expert_action(), *(t for a in env.admissible_actions for t in env.demonstrations(a))]
                digest = hashlib.sha256(env.image_png() + observation.tobytes()).hexdigest()
                seen.append([digest, texts, rewards, info])
                action = env.admissible_actions[int(rng.integers(len(env.admissible_actions)))]
                observation, *rewards, info = env.step(action)
            seen.append([hashlib.sha256(env.image_png()).hexdigest(), rewards, info])
print(json.dumps(seen))
"""
"""Prints all that a task shows in some episodes."""
