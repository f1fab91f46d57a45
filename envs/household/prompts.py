"""ALFWorld's prompts and what its demonstrations say.

What is to be done stands in the prompt, what the agent sees is in the picture. A response names the place
and the thing in hand, thinks about what is left to do, and gives one of the admissible commands.
"""

from collections.abc import Sequence

from gflowvlm.envs.base import Reading
from gflowvlm.envs.household.engine import Observation
from gflowvlm.envs.household.tasks import SUB_GOALS, TREATED, Task, TaskType
from gflowvlm.envs.household.view import View
from gflowvlm.shared.answer_formats import FieldType

RULES = "One command a step; [DONE] stops when the task is done."
FIELDS: dict[str, FieldType] = {"place": str, "hand": str}
MAX_STATE_CHARS = 500
"""Longer game texts (only `help` has one) are cut in the history."""
NOWHERE, NOTHING = "middle of the room", "nothing"

_FINISHED = ("the task is done", "everything is done", "nothing is left to do")
_FIND = ("I still need the {target}", "the {target} is not in my hand yet", "first I must get the {target}")
_PLACE = ("the {target} belongs in the {receptacle}", "the {target} goes to the {receptacle}", "now the {receptacle}")
_LIGHT = ("the {lamp} must be lit beside me", "I have to be at a lit {lamp}", "now the {lamp}")
_TREAT = {
    TaskType.CLEAN: ("the {target} has to be clean", "the {target} must be washed", "the {target} is not clean yet"),
    TaskType.HEAT: ("the {target} has to be hot", "the {target} must be heated", "the {target} is not hot yet"),
    TaskType.COOL: ("the {target} has to be cold", "the {target} must be cooled", "the {target} is not cold yet"),
}
_ANOTHER = ("I still need another {target}", "one more {target} is missing", "a second {target} is to be found")


def goal(observation: Observation) -> str:
    """Returns the prompt's first line from the game's first text."""
    _, _, sentence = observation.feedback.partition("Your task is to:")
    return f"Your task is to: {sentence.strip()} {RULES}"


def state_text(observation: Observation) -> str:
    """Returns what the game said as one line, without greeting and task."""
    text = observation.feedback.partition("Your task is to:")[0].removeprefix("-= Welcome to TextWorld, ALFRED! =-")
    line = " ".join(text.split())
    return line if len(line) <= MAX_STATE_CHARS else line[: MAX_STATE_CHARS - 1] + "…"


def prompt(goal_line: str, past: Sequence[tuple[str, str]] | None, actions: Sequence[str], answer: str) -> str:
    """Returns the prompt.

    Args:
        goal_line: From `goal`.
        past: Text and action of the past states; None for a prompt without history.
        actions: The admissible actions.
        answer: The last line.
    """
    lines = ["State: picture"]
    if past is not None:
        lines = [f"State {t}: {text} Action {t}: {action}" for t, (text, action) in enumerate(past)]
        lines.append(f"State {len(past)}: picture")
    return "\n".join([goal_line, *lines, "Actions: " + ", ".join(actions), answer])


def reading(seen: View, task: Task, reached: int) -> Reading:
    """Returns what the picture shows, and what is left to do in several wordings.

    Args:
        seen: What the agent sees.
        task: What is to be done.
        reached: Sub-goals reached.
    """
    fields = {
        "place": ", ".join(place.name for place in seen.here) or NOWHERE,
        "hand": ", ".join(" ".join([*thing.marks, thing.name]) for thing in seen.held) or NOTHING,
    }
    names = {"target": task.target.lower(), "receptacle": task.receptacle.lower(), "lamp": task.lamp.lower()}
    return Reading(fields, [words.format(**names) for words in _left_to_do(task, reached, seen)])


def wordings() -> list[str]:
    """Returns all that the thoughts can say, with blanks for the names: ``{target}``, ``{receptacle}``, ``{lamp}``."""
    return [*_FINISHED, *_FIND, *_PLACE, *_LIGHT, *_ANOTHER, *(text for texts in _TREAT.values() for text in texts)]


def _left_to_do(task: Task, reached: int, seen: View) -> Sequence[str]:
    """Returns what is left to do, in three wordings."""
    if reached == SUB_GOALS[task.type]:
        return _FINISHED
    in_hand = any(thing.name.split(" ")[0] == task.target.lower() for thing in seen.held)
    if task.type is TaskType.LOOK:
        return _LIGHT if in_hand else _FIND
    if in_hand:
        return _TREAT[task.type] if task.type in TREATED and reached < 2 else _PLACE
    return _ANOTHER if task.type is TaskType.PICK_TWO and reached >= 2 else _FIND
