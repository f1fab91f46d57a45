"""Names of the models that ship with the project."""

import json
from pathlib import Path

_SHIPPED = Path(__file__).resolve().parent / "pretrained"


def shipped_models() -> list[str]:
    """Returns the names of the shipped models."""
    return sorted(folder.parent.name for folder in _SHIPPED.glob("*/config.json"))


def resolve_model(name: str) -> str:
    """Returns the directory of a shipped model; any other name or path unchanged."""
    return str(_SHIPPED / name) if name in shipped_models() else name


def shipped_model_of(task: str) -> str | None:
    """Returns the name of the first shipped model that was made for a task, None where there is none."""
    for name in shipped_models():
        made = json.loads((_SHIPPED / name / "training.json").read_text(encoding="utf-8"))
        if made["request"]["task"]["name"] == task:
            return name
    return None
