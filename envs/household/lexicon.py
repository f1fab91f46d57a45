"""The words of ALFWorld's prompts and responses, for a tokenizer made of them.

A policy copies most of what it says from its prompt. A tiny one learns that when the same thing is the same
token wherever it stands: a name, always without the space before it, a number, and between them the few runs
of text of which all prompts without history and all responses are made.
"""

import re

from gflowvlm.envs.household.engine import INSTALL
from gflowvlm.envs.household.prompts import FIELDS, NOTHING, NOWHERE, RULES, wordings
from gflowvlm.envs.household.tasks import TaskType
from gflowvlm.shared.answer_formats.json_answers import JsonAnswers
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.lexicon import Lexicon
from gflowvlm.shared.response import DONE_TOKEN

VERBS = ("go to ", "take ", "move ", "open ", "close ", "examine ", "use ", "clean ", "heat ", "cool ", "slice ")
BARE_COMMANDS = ("help", "inventory", "look")
BETWEEN = (" from ", " to ", " with ", ", ", ": ")
MARKS = ("hot ", "cold ", "clean ", "sliced ", "on ")
"""What a thing in hand can be said to be."""


def lexicon() -> Lexicon:
    """Returns the words.

    Raises:
        UserError: alfworld is not installed.
    """
    # The names first: they say what is not installed.
    found = names()
    return Lexicon(phrases(), found)


def names() -> tuple[str, ...]:
    """Returns the names of all things and places, as the games write them, sorted.

    Raises:
        UserError: alfworld is not installed.
    """
    try:
        from alfworld.gen import constants
    except ImportError:
        raise UserError(f"task alfworld: package 'alfworld' is not installed; {INSTALL}") from None

    kinds = {*constants.OBJECTS, *constants.VAL_RECEPTACLE_OBJECTS}
    return tuple(sorted(kind.lower() for kind in kinds))


def phrases() -> tuple[str, ...]:
    """Returns the runs of text that stand between names and numbers, with the spaces around them, sorted."""
    from alfworld.gen.goal_library import gdict

    rules, answer = RULES.split(DONE_TOKEN), JsonAnswers().instruction(FIELDS)
    found = {"user:", "assistant:\n", "\nYour task is to: ", f". {rules[0]}", f"{rules[1]}\nState: picture\nActions: "}
    found |= {*VERBS, *(f", {verb}" for verb in VERBS), *BARE_COMMANDS, *BETWEEN, *MARKS, NOWHERE, NOTHING}
    # The commands are sorted, and nothing comes between these.
    found |= {", ".join(BARE_COMMANDS), f", {', '.join(BARE_COMMANDS)}", f"\n{answer}"}
    keys = re.findall(r'"\w+": ', answer)
    found |= {"{" + keys[0] + '"', *(f'", {key}"' for key in keys[1:]), '"}'}
    templates = [*wordings(), *(text for task in TaskType for text in gdict[task.value]["templates"])]
    # Between the blanks of the templates; what a template ends in stands before a full stop or a quotation mark.
    found |= {part for text in templates for part in re.split(r"\{\w+\}", text) if part.strip() != ""}
    return tuple(sorted(found))
