"""Names of the models that ship with the project."""

from pathlib import Path

_SHIPPED = Path(__file__).resolve().parent / "pretrained"


def shipped_models() -> list[str]:
    """Returns the names of the shipped models."""
    return sorted(folder.parent.name for folder in _SHIPPED.glob("*/config.json"))


def resolve_model(name: str) -> str:
    """Returns the directory of a shipped model; any other name or path unchanged."""
    return str(_SHIPPED / name) if name in shipped_models() else name
