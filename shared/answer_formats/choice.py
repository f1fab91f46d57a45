"""Which answer format a setting names."""

import importlib
from functools import lru_cache

from gflowvlm.shared.answer_formats.base import AnswerFormat, ParsedResponse
from gflowvlm.shared.answer_formats.json_answers import JsonAnswers
from gflowvlm.shared.answer_formats.tag_answers import TagAnswers
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.response import DONE_TOKEN

DEFAULT_FORMAT = "json"

_SHIPPED: dict[str, type[AnswerFormat]] = {DEFAULT_FORMAT: JsonAnswers, "tags": TagAnswers}

_TRIED = ("go to cabinet 1", "go to cabinet 10", "+", DONE_TOKEN, "Straße 日本 😀")
"""Actions that a format of somebody else's is tried with."""


@lru_cache(maxsize=16)
def answer_format(name: str) -> AnswerFormat:
    """Returns an answer format.

    Args:
        name: ``json``, ``tags``, or ``module:Object`` for one of the user's own: a class derived from `AnswerFormat`,
            or an object of one.

    Raises:
        UserError: There is no such format, or it does not read its own answers.
    """
    if name in _SHIPPED:
        return _SHIPPED[name]()
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(
            f"task.answer_format {name!r}: there is no such format; use json, tags, or module:Class of your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
        made = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"task.answer_format {name!r}: cannot be imported ({one_line(error)}); its module must be on PYTHONPATH "
            "on every machine of the run"
        ) from None
    if not isinstance(made, AnswerFormat):
        raise UserError(
            f"task.answer_format {name!r}: is no AnswerFormat; derive it from "
            "gflowvlm.shared.answer_formats.AnswerFormat"
        )
    _try(name, made)
    return made


def _try(name: str, made: AnswerFormat) -> None:
    """Makes sure that a format reads what it writes.

    Raises:
        UserError: It does not; the message names the first answer for which it does not.
    """
    starts = set()
    for action in _TRIED:
        text = made.render(action, "a thought", {"place": "here", "number": 3})
        parsed = _checked(name, made, text, action)
        starts.add(text[: parsed.frame_chars[0]] if parsed.frame_chars is not None else "")
        for other in _TRIED:
            _checked(name, made, made.with_action(text, parsed, other), other)
    if len(starts) > 1:
        raise UserError(f"task.answer_format {name!r}: what it writes before an action depends on the action")


def _checked(name: str, made: AnswerFormat, text: str, action: str) -> ParsedResponse:
    """Returns what a format reads out of an answer of its own with a known action."""
    parsed = made.parse(text)
    frame, chars = parsed.frame_chars, parsed.action_chars
    inside = frame is not None and chars is not None and 0 <= frame[0] < chars[0] <= chars[1] < frame[1] <= len(text)
    if parsed.action != action or not inside:
        raise UserError(
            f"task.answer_format {name!r}: does not read its own answer {text!r} (action {parsed.action!r}, "
            f"action_chars {chars}, frame_chars {frame})"
        )
    return parsed
