"""An answer format of the user's own: their code, held to what every answer format promises."""

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from gflowvlm.shared.answer_formats.base import AnswerFormat, FieldType, ParsedResponse
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.user_code import run_own_code

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_ACTIONS = ("go to cabinet 1", "go to cabinet 10", "+", DONE_TOKEN, "Straße 日本 😀")
_THOUGHTS = "a thought"
_FIELDS: dict[str, str | int] = {"place": "here", "number": 3}
_ODD = ("", " ", "\n", "no answer at all", '{"action": ', '{"a": {"b": "+"}}', "<action>", "=>", "[DONE]", "😀\x00")
"""What a policy that is not trained yet may answer."""


class OwnFormat(AnswerFormat):
    """A format of the user's own.

    Whatever its code raises or returns against its promises is a `UserError` that names the setting.

    Args:
        name: What ``task.answer_format`` says.
        own: The format.
    """

    def __init__(self, name: str, own: AnswerFormat) -> None:
        self._name = name
        self._own = own

    def instruction(self, fields: Mapping[str, FieldType]) -> str:
        """See `AnswerFormat.instruction`."""
        return self._text("instruction", self._own.instruction, fields)

    def render(self, action: str, thoughts: str, fields: Mapping[str, Any]) -> str:
        """See `AnswerFormat.render`."""
        return self._text("render", self._own.render, action, thoughts, fields)

    def with_action(self, text: str, parsed: ParsedResponse, action: str) -> str:
        """See `AnswerFormat.with_action`."""
        return self._text("with_action", self._own.with_action, text, parsed, action)

    def parse(self, text: str) -> ParsedResponse:
        """See `AnswerFormat.parse`."""
        parsed = self._call("parse", self._own.parse, text)
        if not isinstance(parsed, ParsedResponse):
            raise self._broken("parse", f"gives a {type(parsed).__name__} and no ParsedResponse for {_cut(text)}")
        if not isinstance(parsed.thoughts, str) or not isinstance(parsed.fields, dict):
            raise self._broken(
                "parse", f"gives thoughts that are no text, or fields that are no dict, for {_cut(text)}"
            )
        if parsed.action is not None and not (isinstance(parsed.action, str) and _in_place(parsed, len(text))):
            raise self._broken(
                "parse",
                f"reads action {_cut(parsed.action)} with action_chars {parsed.action_chars} and frame_chars "
                f"{parsed.frame_chars} out of {_cut(text)}",
            )
        return parsed

    def content_chars(self, text: str) -> list[tuple[int, int]]:
        """See `AnswerFormat.content_chars`."""
        spans = self._call("content_chars", self._own.content_chars, text)
        if not isinstance(spans, list) or not all(_is_span(span, len(text)) for span in spans):
            raise self._broken("content_chars", f"gives {_cut(spans)}, no list of spans of {_cut(text)}")
        return spans

    def check(self) -> None:
        """Makes sure that the format reads what it writes.

        Raises:
            UserError: It does not; the message names the first answer for which it does not.
        """
        self.instruction({"place": str, "number": int})
        starts, closers = set(), set()
        for action in _ACTIONS:
            text = self.render(action, _THOUGHTS, _FIELDS)
            parsed = self._read(text, action)
            start, end = parsed.frame_chars or (0, 0)
            starts.add(text[:start])
            closers.add(text[end - 1])
            self.content_chars(text)
            for other in _ACTIONS:
                changed = self.with_action(text, parsed, other)
                _, last = self._read(changed, other).frame_chars or (0, 0)
                closers.add(changed[last - 1])
                if not changed.startswith(text[:start]):
                    raise self._broken("with_action", "changes what comes before the action")
        if len(starts) > 1:
            raise UserError(f"task.answer_format {self._name!r}: what it writes before an action depends on the action")
        if len(closers) > 1 or any(closer in action for closer in closers for action in _ACTIONS):
            found = ", ".join(repr(closer) for closer in sorted(closers))
            raise UserError(
                f"task.answer_format {self._name!r}: every action must be closed by the same character, which no "
                f"action has; found {found}"
            )
        for text in _ODD:
            self.parse(text)
            self.content_chars(text)

    def _read(self, text: str, action: str) -> ParsedResponse:
        parsed = self.parse(text)
        if parsed.action != action:
            raise UserError(
                f"task.answer_format {self._name!r}: does not read its own answer {text!r} (action {parsed.action!r}, "
                f"action_chars {parsed.action_chars}, frame_chars {parsed.frame_chars})"
            )
        return parsed

    def _text(
        self,
        method: str,
        call: Callable[_Arguments, object],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> str:
        text = self._call(method, call, *args, **kwargs)
        if not isinstance(text, str):
            raise self._broken(method, f"gives a {type(text).__name__} and no text")
        return text

    def _call(
        self,
        method: str,
        call: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        return run_own_code(call, f"task.answer_format {self._name!r}: its {method} fails", *args, **kwargs)

    def _broken(self, method: str, what: str) -> UserError:
        return UserError(f"task.answer_format {self._name!r}: its {method} {what}")


def _in_place(parsed: ParsedResponse, length: int) -> bool:
    chars, frame = parsed.action_chars, parsed.frame_chars
    if not (_is_span(chars, length) and _is_span(frame, length)) or chars is None or frame is None:
        return False
    return frame[0] < chars[0] and chars[1] < frame[1]


def _is_span(span: object, length: int) -> bool:
    if not (isinstance(span, tuple) and len(span) == 2 and all(type(border) is int for border in span)):
        return False
    return bool(0 <= span[0] <= span[1] <= length)


def _cut(value: object) -> str:
    return one_line(repr(value), 80)
