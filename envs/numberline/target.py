"""NumberLine's exact target distribution: R^β/Z over the numbers a walk can end on."""

import math

import numpy as np
from numpy.typing import NDArray

REWARD_SCALE = 100.0
"""c of the reward c / (|target - current| + 1)."""


def log_reward(current: int, target: int) -> float:
    """Returns log R = log(c / (|target - current| + 1)), nats (GFlowVLM's NumberLine reward)."""
    return math.log(REWARD_SCALE) - math.log(abs(target - current) + 1)


def walks_by_end(start: int, low: int, high: int, max_steps: int) -> NDArray[np.float64]:
    """Returns how many action sequences end on each number low..high.

    A sequence is 0..max_steps moves (+ and -, clamped to low..high) and a stop, which the step limit
    forces. Sequences that pass the same numbers by different actions are different leaves of the tree.
    """
    moves = np.zeros(high - low + 1)
    moves[start - low] = 1.0
    total = moves.copy()
    for _ in range(max_steps):
        after = np.zeros_like(moves)
        after[1:] += moves[:-1]
        after[:-1] += moves[1:]
        after[0] += moves[0]
        after[-1] += moves[-1]
        moves = after
        total += moves
    return total


def outcome_distribution(walks: NDArray[np.float64], low: int, target: int, reward_exponent: float) -> dict[str, float]:
    """Returns the probability of each reachable end number under R^β/Z, P_B = 1.

    Args:
        walks: Action sequences per end number, from `walks_by_end`.
        low: The smallest number.
        target: The target number.
        reward_exponent: β.
    """
    ends = [i for i in range(len(walks)) if walks[i] > 0]
    log_weights = np.array(
        [math.log(walks[i]) + reward_exponent * log_reward(low + i, target) for i in ends], dtype=np.float64
    )
    weights = np.exp(log_weights - log_weights.max())
    return {str(low + i): float(p) for i, p in zip(ends, weights / weights.sum(), strict=True)}
