"""Phrases that demonstrations of several tasks use."""

import numpy as np

_COMPARISONS = {
    -1: ("{a} is below {b}", "{a} is less than {b}", "{a} comes before {b}"),
    0: ("{a} is equal to {b}", "{a} is the same as {b}", "{a} matches {b}"),
    1: ("{a} is above {b}", "{a} is more than {b}", "{a} comes after {b}"),
}


def comparisons(a: int, b: int) -> list[str]:
    """Returns how two numbers compare, in three wordings."""
    return [wording.format(a=a, b=b) for wording in _COMPARISONS[int(np.sign(a - b))]]
