"""NumberLine's prompt and demonstrations.

The policy has to read the two numbers from the picture: the prompt names neither the target nor the
current number.
"""

from gflowvlm.envs.wording import comparisons
from gflowvlm.shared.response import format_response

GOAL = "Make the current number equal to the target number. + adds 1, - takes 1 away, [DONE] stops."
ANSWER = 'Answer: {"current": , "target": , "thoughts": "", "action": ""}'


def demonstrations(action: str, current: int, target: int) -> list[str]:
    """Returns responses with the right numbers, a thought about their relation, and the action."""
    fields = {"current": current, "target": target}
    return [format_response(action, thought, fields) for thought in comparisons(current, target)]
