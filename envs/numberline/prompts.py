"""NumberLine's prompts and demonstrations.

The policy has to read the two numbers from the picture: the prompt names neither the target nor the
current number. Past numbers stand in the history as text, because only the current picture is shown.
"""

from collections.abc import Sequence

import numpy as np

from shared.response import format_response

GOAL = "Make the current number equal to the target number. + adds 1, - takes 1 away, [DONE] stops."
ANSWER = 'Answer: {"current": , "target": , "thoughts": "", "action": ""}'

# Thoughts state the relation and not the action, so that the action is still open after them
# (otherwise log P(action | thoughts) is about 0 and carries no signal).
THOUGHTS = {
    -1: ("{current} is below {target}", "{current} is less than {target}", "{current} comes before {target}"),
    0: ("{current} is equal to {target}", "{current} is the same as {target}", "{current} matches {target}"),
    1: ("{current} is above {target}", "{current} is more than {target}", "{current} comes after {target}"),
}


def history_prompt(past_numbers: Sequence[int], past_actions: Sequence[str], actions: Sequence[str]) -> str:
    """Returns the non-Markovian prompt: goal, history, admissible actions, answer format."""
    lines = [
        f"State {t}: {number} Action {t}: {action}"
        for t, (number, action) in enumerate(zip(past_numbers, past_actions, strict=True))
    ]
    return "\n".join([GOAL, *lines, f"State {len(lines)}: picture", _actions(actions), ANSWER])


def markov_prompt(actions: Sequence[str]) -> str:
    """Returns the Markovian prompt: goal, admissible actions, answer format."""
    return "\n".join([GOAL, "State: picture", _actions(actions), ANSWER])


def demonstration(action: str, current: int, target: int, rng: np.random.Generator) -> str:
    """Returns a response with the right numbers, a thought about their relation, and the action."""
    choices = demonstrations(action, current, target)
    return choices[int(rng.integers(len(choices)))]


def demonstrations(action: str, current: int, target: int) -> list[str]:
    """Returns the responses of `demonstration`, one for each wording of the thought."""
    thoughts = [t.format(current=current, target=target) for t in THOUGHTS[int(np.sign(current - target))]]
    return [format_response(action, thought, {"current": current, "target": target}) for thought in thoughts]


def _actions(actions: Sequence[str]) -> str:
    return "Actions: " + " ".join(actions)
