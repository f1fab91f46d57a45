"""The format of a policy's response, and where chain of thought and action stand in its tokens.

A response is one JSON object whose last key is ``"action"``::

    {"current": 3, "target": 5, "thoughts": "3 is below 5", "action": "+"}

``[DONE]`` as the action's value is the stop action: one dedicated token of the tokenizer, so that its
probability at the action's first position is one log-softmax entry (GFlowVLM eq. 5).
Responses are model output and therefore untrusted: nothing in this module raises on their content.
"""

import json
import re
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class TokenSpans:
    """Token spans of a response: CoT is ``[0, cot_end)``, the action's value ``[cot_end, action_end)``.

    A malformed response is all chain of thought: ``cot_end == action_end == number of tokens``.
    """

    cot_end: int
    action_end: int


def token_spans(
    token_ids: Sequence[int],
    action_chars: tuple[int, int] | None,
    decode: Callable[[Sequence[int]], str],
) -> TokenSpans:
    """Finds the chain of thought and the action in the sampler's own tokens.

    Args:
        token_ids: The response tokens, exactly as sampled (an end token may stand last).
        action_chars: Span of the action's value in ``decode(token_ids)``, or None when malformed.
        decode: Turns token ids into text, special tokens kept.

    Returns:
        The spans. The first action token is the first that reaches past the start of the value.
    """
    if action_chars is None:
        return TokenSpans(len(token_ids), len(token_ids))
    start, end = action_chars
    cot_end = _first_prefix(token_ids, decode, longer_than=start) - 1
    action_end = _first_prefix(token_ids, decode, longer_than=end - 1)
    return TokenSpans(cot_end, max(action_end, cot_end + 1))


def _first_prefix(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], longer_than: int) -> int:
    """Returns the length of the shortest token prefix whose text has more than `longer_than` characters."""
    low, high = 1, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(token_ids[:middle])) > longer_than:
            high = middle
        else:
            low = middle + 1
    return low
