"""The format of a policy's response, and where chain of thought and action stand in its tokens.

A response is one JSON object whose last key is ``"action"``::

    {"current": 3, "target": 5, "thoughts": "3 is below 5", "action": "+"}

``[DONE]`` as the action's value is the stop action: one dedicated token of the tokenizer, so that its
probability at the action's first position is one log-softmax entry (GFlowVLM eq. 5).
Responses are model output and therefore untrusted: nothing in this module raises on their content.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

DONE_TOKEN = "[DONE]"
"""The stop action, and the one token that stands for it."""

MAX_RESPONSE_CHARS = 20_000
"""Longer responses are malformed without being looked at."""

_ACTION_AT_END = re.compile(r'"action"\s*:\s*"(?P<action>[^"\\]*)"\s*\}\s*\Z')


@dataclass(frozen=True)
class ParsedResponse:
    """What was read out of a response.

    Attributes:
        action: The action's value, or None when the response is malformed.
        thoughts: The chain of thought, empty when absent.
        fields: Every other key of the JSON object.
        action_chars: Start and end of the action's value in the text, or None when malformed.
    """

    action: str | None
    thoughts: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    action_chars: tuple[int, int] | None = None

    @property
    def frame_chars(self) -> tuple[int, int] | None:
        """Start and end of the action's value with the one character in front of it and the one behind it."""
        if self.action_chars is None:
            return None
        start, end = self.action_chars
        return start - 1, end + 1

    @property
    def malformed(self) -> bool:
        """Whether no action could be read."""
        return self.action is None


MALFORMED = ParsedResponse(action=None)


def format_response(action: str, thoughts: str, fields: dict[str, Any] | None = None) -> str:
    """Returns the response text of a demonstration: the fields, the thoughts, and the action last."""
    return json.dumps({**(fields or {}), "thoughts": thoughts, "action": action}, ensure_ascii=False)


def parse_response(text: str) -> ParsedResponse:
    """Reads a response; returns `MALFORMED` for anything that is not the documented format."""
    if len(text) > MAX_RESPONSE_CHARS:
        return MALFORMED
    match = _ACTION_AT_END.search(text)
    if match is None:
        return MALFORMED
    try:
        # Pairs are kept in order so that the last key can be checked; a repeated key is malformed.
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return MALFORMED
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) for p in pairs):
        return MALFORMED
    content = dict(pairs)
    if len(content) != len(pairs) or pairs[-1] != ("action", match["action"]):
        return MALFORMED
    content.pop("action")
    thoughts = content.pop("thoughts", "")
    return ParsedResponse(
        action=match["action"],
        thoughts=thoughts if isinstance(thoughts, str) else "",
        fields=content,
        action_chars=match.span("action"),
    )


def with_action(text: str, parsed: ParsedResponse, action: str) -> str:
    """Returns a response's text with another action in its place.

    Args:
        text: The text.
        parsed: What `parse_response` read out of it, an action among it.
        action: The other action.

    Raises:
        ValueError: There is no action in it.
    """
    if parsed.action_chars is None:
        raise ValueError(f"no action in {text!r}")
    start, end = parsed.action_chars
    return f"{text[:start]}{action}{text[end:]}"


@dataclass(frozen=True)
class ResponseLayout:
    """Where chain of thought, action and stop action stand in a response's tokens.

    `PolicyInputs.read` makes it: what it says depends on the tokenizer. The action begins with the first token that
    reaches into its value or into the one character in front of it, a rule on the text alone: behind one chain of
    thought all actions begin at the same place. It ends with the token that holds the first character behind its
    value. So no action's tokens are the beginning of another's, and their probabilities add up to 1 at most.

    Attributes:
        cot_end: Tokens ``[0, cot_end)`` are chain of thought.
        action_end: Tokens ``[cot_end, action_end)`` are the action with what ends it; equal to `cot_end`, the number
            of tokens, when malformed.
        stop_ids: The tokens of the stop action behind the same chain of thought: log P(⊤) is the sum of their
            log-probabilities. Where the response stops, its own tokens of the action. Empty where there is no place
            at which stopping could be scored.
    """

    cot_end: int
    action_end: int
    stop_ids: list[int] = field(default_factory=list)

    @classmethod
    def malformed(cls, tokens: int) -> "ResponseLayout":
        """Returns the layout of a malformed response of so many tokens: it is all chain of thought."""
        return cls(tokens, tokens)
