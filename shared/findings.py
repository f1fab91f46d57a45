"""What a check found, as the commands that check things show it."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What a check found."""

    OK = "ok"
    NOTE = "note"
    """It works without it, or worse than it could."""
    BROKEN = "broken"
    """It does not work."""


@dataclass(frozen=True)
class Check:
    """One check's result.

    Attributes:
        name: What was looked at.
        status: What was found.
        detail: The finding in a few words.
        advice: What to do about it, one line; empty when all is well.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def found_and_advice(message: object) -> tuple[str, str]:
    """Returns what an error's line says was found and, behind its last semicolon, what it says to do about it."""
    found, separator, advice = str(message).rpartition("; ")
    return (found, advice) if separator else (str(message), "")
