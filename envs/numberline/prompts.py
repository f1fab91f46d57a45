"""NumberLine's prompt and what its demonstrations say.

The policy has to read the two numbers from the picture: the prompt names neither the target nor the
current number.
"""

from gflowvlm.envs.base import Reading
from gflowvlm.envs.wording import comparisons
from gflowvlm.shared.answer_formats import FieldType

GOAL = "Make the current number equal to the target number. + adds 1, - takes 1 away, [DONE] stops."
FIELDS: dict[str, FieldType] = {"current": int, "target": int}


def reading(current: int, target: int) -> Reading:
    """Returns the right numbers, and thoughts about their relation."""
    return Reading({"current": current, "target": target}, comparisons(current, target))
