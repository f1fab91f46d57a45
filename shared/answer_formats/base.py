"""What every answer format is.

Responses are model output and therefore untrusted: nothing here raises on their content.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_RESPONSE_CHARS = 20_000
"""Longer responses are malformed without being looked at."""

FieldType = type[str] | type[int]
"""What a task says of a field of its answers: text or a number."""


@dataclass(frozen=True)
class ParsedResponse:
    """What was read out of a response.

    Attributes:
        action: The action, or None when the response is malformed.
        thoughts: The chain of thought as text, empty when absent.
        fields: Whatever else the answer says, by name.
        action_chars: Start and end of the action's value in the text, or None when malformed.
        frame_chars: The same with what opens and what closes the value: from the one character that begins every
            action (JSON: the opening quote) to the first one that cannot stand inside an action (the closing quote).
    """

    action: str | None
    thoughts: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    action_chars: tuple[int, int] | None = None
    frame_chars: tuple[int, int] | None = None

    @property
    def malformed(self) -> bool:
        """Whether no action could be read."""
        return self.action is None


MALFORMED = ParsedResponse(action=None)


class AnswerFormat(ABC):
    """How a policy's answers are written and read.

    An answer says some fields of the state and some thoughts, and gives the action last. Derive from this class for a
    format of your own, and name it in ``task.answer_format`` as ``module:Class``.
    """

    @abstractmethod
    def instruction(self, fields: Mapping[str, FieldType]) -> str:
        """Returns the prompt's last line, which asks for an answer.

        Args:
            fields: Names and types of the task's fields, in order.
        """

    @abstractmethod
    def render(self, action: str, thoughts: str, fields: Mapping[str, Any]) -> str:
        """Returns the text of an answer. What comes before the action must not depend on it."""

    @abstractmethod
    def parse(self, text: str) -> ParsedResponse:
        """Reads a response; `MALFORMED` where no action can be read. Must not raise, whatever the text.

        Where an action is read, all four of its attributes are given. A value is always closed by the same character,
        which no value has, or an action could be the beginning of another.
        """

    @abstractmethod
    def with_action(self, text: str, parsed: ParsedResponse, action: str) -> str:
        """Returns a response's text with another action in the place of its own; all before it stays as it is.

        Args:
            text: The text.
            parsed: What `parse` read out of it, an action among it.
            action: The other action.
        """

    def content_chars(self, text: str) -> list[tuple[int, int]]:
        """Returns the character spans of an answer's values: what it says, as against how it is written."""
        span = self.parse(text).action_chars
        return [] if span is None else [span]
