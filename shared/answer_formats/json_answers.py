"""Answers as a JSON object whose last key is ``"action"``."""

import json
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

_MAX_FAILED_OBJECTS = 64
"""Beginnings of objects in a response that turn out to be none, after which no more are tried."""

_OBJECT_START = re.compile(r'\{\s*"')
_ACTION_AT_END = re.compile(r'"action"\s*:\s*(?:"(?P<text>(?:[^"\\]|\\.)*)"|(?P<number>-?\d[\d.eE+-]*))\s*\}\Z')
_VALUES = re.compile(r'"[^"\\]*"\s*:\s*(?:"(?P<text>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s",{}\[\]]+))')
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)


class JsonAnswers(AnswerFormat):
    """One JSON object whose last key is ``"action"``::

        {"current": 3, "target": 5, "thoughts": "3 is below 5", "action": "+"}

    Text around the object, a fence among it, is no part of the answer. Of several objects the last counts. The action
    may be a number; a key that is repeated makes its object none.
    """

    def instruction(self, fields: Mapping[str, FieldType]) -> str:
        """Returns the object with nothing filled in."""
        blanks = {name: '""' if kind is str else "" for name, kind in fields.items()}
        keys = {**blanks, "thoughts": '""', "action": '""'}
        return "Answer: {" + ", ".join(f'"{name}": {blank}' for name, blank in keys.items()) + "}"

    def render(self, action: str, thoughts: str, fields: Mapping[str, Any]) -> str:
        """Returns the object on one line."""
        return json.dumps({**fields, "thoughts": thoughts, "action": action}, ensure_ascii=False)

    def parse(self, text: str) -> ParsedResponse:
        """Reads the last object of a response that ends in an action."""
        if len(text) > MAX_RESPONSE_CHARS or '"action"' not in text:
            return MALFORMED
        found, position, failed = MALFORMED, 0, 0
        while failed < _MAX_FAILED_OBJECTS and (start := _OBJECT_START.search(text, position)) is not None:
            try:
                pairs, end = _DECODER.raw_decode(text, start.start())
                read = _read(text, start.start(), end, pairs)
            except (ValueError, RecursionError):
                position, failed = start.start() + 1, failed + 1
                continue
            position, found = end, found if read.malformed else read
        return found

    def with_action(self, text: str, parsed: ParsedResponse, action: str) -> str:
        """Returns the text with another action, always as a string."""
        if parsed.action_chars is None:
            raise ValueError(f"no action in {text!r}")
        start, end = parsed.action_chars
        if text[start - 1] == text[end] == '"':
            start, end = start - 1, end + 1
        return text[:start] + json.dumps(action, ensure_ascii=False) + text[end:]

    def content_chars(self, text: str) -> list[tuple[int, int]]:
        """Returns the spans of the object's values."""
        return [match.span("text" if match["text"] is not None else "bare") for match in _VALUES.finditer(text)]


def _read(text: str, start: int, end: int, pairs: Any) -> ParsedResponse:
    """Reads one object, given as its pairs in order.

    Raises:
        ValueError: Its action is no text that could be written anywhere.
        RecursionError: It is nested too deeply.
    """
    keys = [key for key, _ in pairs]
    match = _ACTION_AT_END.search(text[start:end]) if keys[-1:] == ["action"] else None
    if match is None or len(set(keys)) != len(keys):
        return MALFORMED
    content = {key: _plain(value) for key, value in pairs}
    action = content.pop("action")
    if isinstance(action, str):
        action.encode()
    written = "text" if match["text"] is not None else "number"
    first, last = match.span(written)
    thoughts = content.pop("thoughts", "")
    return ParsedResponse(
        action=action if isinstance(action, str) else match["number"],
        thoughts=thoughts if isinstance(thoughts, str) else "",
        fields=content,
        action_chars=(start + first, start + last),
        frame_chars=(start + first - 1, start + last + 1),
    )


def _plain(value: Any) -> Any:
    """Returns a value as `json.loads` gives it; objects inside come as their pairs in order."""
    if isinstance(value, tuple):
        return {key: _plain(inner) for key, inner in value}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
