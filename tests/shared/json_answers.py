"""Answers in JSON, the format that tasks have by default."""

from typing import Any

from gflowvlm.shared.answer_formats.json_answers import JsonAnswers

parse_response = JsonAnswers().parse


def format_response(action: str, thoughts: str, fields: dict[str, Any] | None = None) -> str:
    """Returns the text of a demonstration."""
    return JsonAnswers().render(action, thoughts, fields or {})
