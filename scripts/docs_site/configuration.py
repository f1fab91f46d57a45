"""The page of all settings, made from the pydantic models and the presets."""

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from gflowvlm.run.preset_library import PRESETS, load_preset, preset_names
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.settings import PathMarker, Settings
from gflowvlm.shared.task_settings import TaskSettings, task_names, task_settings_class

INTRODUCTION = """\
# Configuration

<!-- Made from the code by `make reference`; a test compares. -->

Every setting of a run, from `shared/config.py` and, for a task, `settings.py` in its folder of `envs/`. A setting has a
dotted key: `gflowvlm train learner.steps=100 objective.loss=subtb` changes two. A file has the same keys, nested:
`gflowvlm presets numberline-tiny > my.yaml` writes one with all of them, `gflowvlm train --config my.yaml` reads it,
and whatever it leaves out has the default of this page.

An unknown key, a value out of its bounds, or values that do not fit each other are refused with one line that names
the key. Values are read as YAML; times end in `_s` and are seconds.

A relative path, also one in a file, starts at the folder where the command was started; `~` is your home. It is made
absolute once, at the start: a run's `config.yaml` has absolute paths, and a missing folder is named before anything
starts. `policy.model` is a path when it begins with `.`, `/` or `~`, or when such a folder is there; else it names a
model that ships with the project, or one on the Hugging Face hub. `gflowvlm submit` wants absolute paths, which are the
cluster's.

A [preset](#presets) is such a file that ships with the project.
"""

_NAMES: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}


def configuration_page() -> str:
    """Returns the page in Markdown."""
    parts = [INTRODUCTION]
    for title, prefix, model in _sections():
        parts += [f"## {title}\n\n{_summary(model)}\n", settings_table(model, prefix)]
    return "\n".join([*parts, *_presets()])


def fields_without_description() -> list[str]:
    """Returns the dotted keys of settings that say nothing of themselves."""
    return [
        f"{prefix}{name}"
        for _, prefix, model in _sections()
        for name, field in model.model_fields.items()
        if not field.description and not _models(field.annotation)
    ]


def _sections() -> Iterator[tuple[str, str, type[Settings]]]:
    """Yields (title, prefix of the keys, model) of all of them."""
    yield "run", "", RunConfig
    for name, field in RunConfig.model_fields.items():
        for model in _models(field.annotation):
            yield from _nested(model, name)


def _nested(model: type[Settings], dotted: str) -> Iterator[tuple[str, str, type[Settings]]]:
    """Yields a section and those inside it."""
    task = model.model_fields.get("name") if dotted == "task" else None
    yield dotted if task is None else f"{dotted}: {task.default}", f"{dotted}.", model
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            yield from _nested(inner, f"{dotted}.{name}")


def _models(annotation: object) -> tuple[type[Settings], ...]:
    """Returns the sections that an annotation stands for: one, that of each task for any task, none for a value."""
    if annotation is TaskSettings:
        return tuple(task_settings_class(name) for name in task_names())
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    models = tuple(o for o in options if isinstance(o, type) and issubclass(o, Settings))
    return models if len(models) == len(options) else ()


def settings_table(model: type[Settings], prefix: str) -> str:
    """Returns one section's keys as a table.

    Args:
        model: The section.
        prefix: What stands before its keys, with the dot.
    """
    rows = ["| key | value | default | what it says |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if not _models(field.annotation):
            value = ", ".join([_type(field.annotation), *_bounds(field)])
            says = _cell(field.description or "")
            rows.append(f"| `{prefix}{name}` | {value} | {_value(field.default)} | {says} |")
    return "\n".join(rows) + "\n"


def _summary(model: type[Settings]) -> str:
    """Returns the first paragraph of a section's docstring."""
    return (model.__doc__ or "").strip().split("\n\n")[0]


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return ", ".join("`null`" if a is NoneType else _type(a) for a in arguments)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if origin is Annotated:
        return ", ".join([_type(arguments[0]), *_bounds(FieldInfo.from_annotation(annotation))])
    return _NAMES[annotation]


def _bounds(field: FieldInfo) -> Iterator[str]:
    for bound in field.metadata:
        match bound:
            case Ge():
                yield f"≥\N{NO-BREAK SPACE}{_number(bound.ge)}"
            case Gt():
                yield f">\N{NO-BREAK SPACE}{_number(bound.gt)}"
            case Le():
                yield f"≤\N{NO-BREAK SPACE}{_number(bound.le)}"
            case Lt():
                yield f"<\N{NO-BREAK SPACE}{_number(bound.lt)}"
            case MinLen():
                yield f"length ≥\N{NO-BREAK SPACE}{bound.min_length}"
            case PathMarker():
                yield "path or name" if bound.or_name else "path"
            case MaxLen():
                yield f"length ≤\N{NO-BREAK SPACE}{bound.max_length}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(f"`{entry}`" for entry in value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _presets() -> Iterator[str]:
    yield (
        "## Presets\n\nWhat each shipped preset changes. `gflowvlm presets NAME` shows all of one, "
        "`gflowvlm train --preset NAME` runs it.\n"
    )
    for name in preset_names():
        config = load_preset(name)
        defaults = _flat(RunConfig.model_validate({"task": {"name": config.task.name}}).model_dump(mode="json"))
        yield f"### {name}\n\n{_comment(name)}\n"
        rows = ["| key | default | here |", "|---|---|---|"]
        for key, value in _flat(config.model_dump(mode="json")).items():
            if value != defaults[key] or (key == "task.name" and value != RunConfig().task.name):
                rows.append(f"| `{key}` | {_value(defaults[key])} | {_value(value)} |")
        yield "\n".join(rows) + "\n"


def _comment(preset: str) -> str:
    """Returns the comment that a preset's file begins with."""
    lines = (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
    text = []
    for line in lines:
        if not line.startswith("#"):
            break
        text.append(line.removeprefix("#").strip())
    return " ".join(text)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
