"""How a policy answers: what the prompt asks for, how demonstrations are written, how responses are read."""

from gflowvlm.shared.answer_formats.base import MALFORMED, MAX_RESPONSE_CHARS, AnswerFormat, FieldType, ParsedResponse
from gflowvlm.shared.answer_formats.choice import DEFAULT_FORMAT, answer_format

__all__ = [
    "DEFAULT_FORMAT",
    "MALFORMED",
    "MAX_RESPONSE_CHARS",
    "AnswerFormat",
    "FieldType",
    "ParsedResponse",
    "answer_format",
]
