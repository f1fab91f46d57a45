"""NumberSequence's prompt and what its demonstrations say.

The policy has to read the sequence from the picture: the prompt names none of its numbers but the admissible ones.
"""

from collections.abc import Collection, Sequence

from gflowvlm.envs.base import Reading
from gflowvlm.shared.answer_formats import FieldType

GOAL = (
    "Fill each ? of the sequence: add the same step each time, or add the two numbers before. [DONE] when no ? is left."
)
FIELDS: dict[str, FieldType] = {"sequence": str, "missing": int}

_COMPLETE = ("no number is missing", "the sequence is complete", "nothing is left to fill")
_NO_RULE = ("no rule fits", "the numbers follow no rule", "there is no rule")
_STEP = ("steps of {step}", "{step} more each time", "each adds {step}")
_SUM = ("sums of two", "the two before together", "each is the sum of two")


def sequence_text(numbers: Sequence[int]) -> str:
    """Returns a sequence as history and responses have it."""
    return " ".join(str(number) for number in numbers)


def reading(numbers: Sequence[int], missing: int, rules: Collection[str]) -> Reading:
    """Returns the right sequence, and thoughts on the rules that it obeys.

    Args:
        numbers: The sequence so far.
        missing: How many numbers are still missing.
        rules: Names of the rules that all of the numbers obey.
    """
    fields: dict[str, str | int] = {"sequence": sequence_text(numbers), "missing": missing}
    if missing == 0:
        thoughts = list(_COMPLETE)
    elif not rules:
        thoughts = list(_NO_RULE)
    else:
        step = numbers[-1] - numbers[-2]
        wordings = [{"step": _STEP, "sum": _SUM}[rule] for rule in rules]
        thoughts = [" and ".join(parts).format(step=step) for parts in zip(*wordings, strict=True)]
    return Reading(fields, thoughts)
