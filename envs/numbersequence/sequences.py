"""The two rules, the prefixes they make, and the numbers that may come next."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

PREFIX_LENGTH = 3
"""Numbers that are given: the fewest that tell the rules apart, and the most that both rules can share."""


def next_by_rule(numbers: Sequence[int]) -> dict[str, int]:
    """Returns the next number by every rule that all of the numbers obey.

    ``step`` is an arithmetic sequence; ``sum`` a Fibonacci-like one, where every number from the third on is the sum of
    the two before.
    """
    step = numbers[1] - numbers[0]
    following = {}
    if all(b - a == step for a, b in pairwise(numbers)):
        following["step"] = numbers[-1] + step
    if all(a + b == c for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False)):
        following["sum"] = numbers[-1] + numbers[-2]
    return following


def draw_prefix(rng: np.random.Generator, low: int, high: int, ambiguous_share: float) -> tuple[int, ...]:
    """Returns the first numbers of a sequence.

    Args:
        rng: Source of the draws.
        low: Smallest start and step.
        high: Largest; above `low`.
        ambiguous_share: Probability of a prefix a, 2a, 3a, which both rules continue: 1, 2, 3 by 4 or by 5.
    """
    start = int(rng.integers(low, high + 1))
    if rng.random() < ambiguous_share:
        return start, 2 * start, 3 * start
    if rng.random() < 0.5:
        step = _other_than(start, rng, low, high)
        return start, start + step, start + 2 * step
    second = _other_than(2 * start, rng, low, high)
    return start, second, start + second


def candidates(numbers: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """Returns numbers to choose from, ascending and above the last one: the next by either rule, and others.

    Both rules' formulas are among them whether or not the sequence obeys the rule, so that the list alone says little.

    Args:
        numbers: The sequence so far, increasing at its end.
        count: How many, at least 2.
        rng: Draws the others.
    """
    last, before = numbers[-1], numbers[-2]
    formulas = {2 * last - before, last + before}
    reach = max(formulas) + count
    others = [number for number in range(last + 1, reach + 1) if number not in formulas]
    drawn = rng.choice(others, size=count - len(formulas), replace=False)
    return sorted(formulas | {int(number) for number in drawn})


def _other_than(excluded: int, rng: np.random.Generator, low: int, high: int) -> int:
    choices = [number for number in range(low, high + 1) if number != excluded]
    return choices[int(rng.integers(len(choices)))]
