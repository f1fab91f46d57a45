"""How fast the task's environment is."""

import time

import numpy as np

from gflowvlm.envs.registry import make_env
from gflowvlm.shared.config import RunConfig
from gflowvlm.studies.benchmarks.measurement import Measurement, Say, Scale

PART = "environment"
_MOVES = ("reset", "prompt", "picture", "step")


def bench_environment(config: RunConfig, scale: Scale, say: Say) -> list[Measurement]:
    """Plays random admissible actions in one environment: reset, prompt, picture as PNG, step."""
    say(f"{config.task.name}, {scale.seconds:g} s")
    env, rng = make_env(config.task), np.random.default_rng(config.seed)
    spent, steps, episodes = dict.fromkeys(_MOVES, 0.0), 0, 0
    began = time.perf_counter()
    while time.perf_counter() - began < scale.seconds:
        clock = time.perf_counter()
        env.reset(seed=episodes, options={"split": "id"})
        clock = _lap(spent, "reset", clock)
        episodes += 1
        while env.end is None:
            env.prompt()
            clock = _lap(spent, "prompt", clock)
            env.image_png()
            clock = _lap(spent, "picture", clock)
            actions = env.admissible_actions
            env.step(actions[int(rng.integers(len(actions)))])
            clock = _lap(spent, "step", clock)
            steps += 1
    elapsed = time.perf_counter() - began
    what = "one environment, one process: reset, prompt, PNG and step of random admissible actions"
    counts = {"reset": episodes, "prompt": steps, "picture": steps, "step": steps}
    return [
        Measurement(PART, "environment_steps_per_s", steps / elapsed, "steps/s", what),
        *(
            Measurement(
                PART, f"environment_{move}_us", spent[move] / counts[move] * 1e6, "us", f"mean time of one {move}"
            )
            for move in _MOVES
        ),
    ]


def _lap(spent: dict[str, float], move: str, since: float) -> float:
    now = time.perf_counter()
    spent[move] += now - since
    return now
