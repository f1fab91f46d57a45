"""Answers in tags, which instruct models follow most readily."""

import re
from collections.abc import Mapping
from typing import Any

from gflowvlm.shared.answer_formats.base import (
    MALFORMED,
    MAX_RESPONSE_CHARS,
    AnswerFormat,
    FieldType,
    ParsedResponse,
)

_ACTION = re.compile(r"<action>([^<]*)</action>")
_TAGGED = re.compile(r"<(\w{1,64})>([^<]*)</\1>")
_WRITTEN = {"&lt;": "<", "&amp;": "&"}
_THINK, _THOUGHT = "<think>", "</think>"


class TagAnswers(AnswerFormat):
    """One tag for each field, then the thoughts, and the action last::

        <current>3</current><target>5</target><think>3 is below 5</think><action>+</action>

    Text between and around the tags is no part of the answer. Of several actions the last counts. Fields are text.
    ``<`` inside a value is written ``&lt;``.
    """

    def instruction(self, fields: Mapping[str, FieldType]) -> str:
        """Returns the tags with dots inside."""
        return "Answer: " + "".join(f"<{name}>...</{name}>" for name in (*fields, "think", "action"))

    def render(self, action: str, thoughts: str, fields: Mapping[str, Any]) -> str:
        """Returns the tags on one line."""
        values = {**fields, "think": thoughts, "action": action}
        return "".join(f"<{name}>{_escaped(str(value))}</{name}>" for name, value in values.items())

    def parse(self, text: str) -> ParsedResponse:
        """Reads the last action of a response, and what stands in tags before it."""
        if len(text) > MAX_RESPONSE_CHARS:
            return MALFORMED
        matches = list(_ACTION.finditer(text))
        if not matches:
            return MALFORMED
        match = matches[-1]
        before = text[: match.start()]
        closed = before.rfind(_THOUGHT)
        opened = before.rfind(_THINK, 0, max(closed, 0))
        thoughts = ""
        if 0 <= opened < closed:
            thoughts = _plain(before[opened + len(_THINK) : closed].strip())
            before = before[:opened] + before[closed + len(_THOUGHT) :]
        inside = match[1]
        first = match.start(1) + len(inside) - len(inside.lstrip())
        return ParsedResponse(
            action=_plain(inside.strip()),
            thoughts=thoughts,
            fields={name: _plain(value.strip()) for name, value in _TAGGED.findall(before)},
            action_chars=(first, first + len(inside.strip())),
            # White space around the value is in the frame: it could stand inside a longer value, and closes none.
            frame_chars=(match.start(1) - 1, match.end(1) + 1),
        )

    def with_action(self, text: str, parsed: ParsedResponse, action: str) -> str:
        """Returns the text with another action, white space around it as it is."""
        if parsed.action_chars is None:
            raise ValueError(f"no action in {text!r}")
        start, end = parsed.action_chars
        return text[:start] + _escaped(action) + text[end:]

    def content_chars(self, text: str) -> list[tuple[int, int]]:
        """Returns the spans of what stands in the tags."""
        return [match.span(2) for match in _TAGGED.finditer(text)]


def _escaped(value: str) -> str:
    """Returns a value as it is written: as it is, but for what would read as something else."""
    return re.sub(r"&(?=lt;|amp;)", "&amp;", value).replace("<", "&lt;")


def _plain(written: str) -> str:
    return re.sub("&lt;|&amp;", lambda match: _WRITTEN[match[0]], written)
