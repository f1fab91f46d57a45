"""Reading and writing run configurations: YAML, presets, dotted overrides; and a task's settings on a command line."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import TaskSettings, default_settings, task_names

Settings = TypeVar("Settings", bound=TaskSettings)


def load_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        UserError: The file is missing, is no YAML, or does not hold a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping of settings, found {type(content).__name__}")
    return content


def apply_overrides(settings: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns the settings with ``section.key=value`` overrides applied; values are read as YAML.

    Raises:
        UserError: An override has no ``=`` or reaches through a value that is no section.
    """
    result: dict[str, Any] = _copied(settings)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if equals == "" or dotted.strip() == "":
            raise UserError(f"override {override!r}: write section.key=value, for example learner.steps=10")
        try:
            value = _number_or(yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML") from None
        _set(result, dotted.strip(), value, f"override {override!r}")
    return result


def apply_changes(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with values set by dotted keys (``{"learner.steps": 10}``).

    Raises:
        UserError: A key reaches through a value that is no section.
    """
    result: dict[str, Any] = _copied(settings)
    for dotted, value in changes.items():
        _set(result, dotted, value, f"setting {dotted!r}")
    return result


def parse_config(settings: dict[str, Any], where: str, changed: Iterable[str] = ()) -> RunConfig:
    """Validates settings.

    Args:
        settings: Nested mapping of settings.
        where: What to name in an error: a file, a preset.
        changed: Dotted keys whose values are not from there but from overrides; an error in one does not name it.

    Raises:
        UserError: One line that names the first wrong setting, its value, and what is allowed.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        wrong = _dotted(error)
        overridden = any(wrong == key or wrong.startswith(f"{key}.") for key in changed)
        problem = _first_problem(error, _known(settings))
        raise UserError(problem if overridden else f"{where}: {problem}") from None


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Returns the configuration in a YAML file, with overrides applied."""
    overrides = list(overrides)
    return parse_config(apply_overrides(load_yaml(path), overrides), str(path), overridden_keys(overrides))


def overridden_keys(overrides: Iterable[str]) -> list[str]:
    """Returns the dotted keys of ``section.key=value`` overrides."""
    return [override.partition("=")[0].strip() for override in overrides]


def override_task(settings: Settings, overrides: Iterable[str]) -> Settings:
    """Returns a task's settings with ``key=value`` overrides applied.

    Raises:
        UserError: One line that names the first wrong setting, its value, and what is allowed.
    """
    old = settings.model_dump()
    try:
        return type(settings).model_validate(apply_overrides(old, overrides))
    except ValidationError as error:
        raise UserError(f"task {old['name']}: {_first_problem(error, old)}") from None


def dump_config(config: RunConfig) -> str:
    """Returns the configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the defaults of every key that settings may have, those of their task among them."""
    task = settings.get("task")
    name = task.get("name") if isinstance(task, dict) else None
    chosen = {"task": default_settings(name)} if name in task_names() else {}
    return RunConfig.model_validate(chosen).model_dump()


def _set(settings: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *sections, key = dotted.split(".")
    target = settings
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"{where}: {section!r} is a value, not a section")
    target[key] = value


def _copied(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in settings.items()}


def _number_or(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as text (it wants 1.0e-3); on a command line it is a number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _dotted(error: ValidationError) -> str:
    return ".".join(str(part) for part in error.errors()[0]["loc"])


def _first_problem(error: ValidationError, known: dict[str, Any]) -> str:
    problem = error.errors()[0]
    dotted = _dotted(error)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}{_suggestion(dotted, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if dotted == "":
        return message
    return f"{dotted} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(dotted: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(dotted, _dotted_keys(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; `gflowvlm presets NAME` shows every key"


def _dotted_keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in settings.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += _dotted_keys(value, f"{prefix}{key}.")
    return keys
