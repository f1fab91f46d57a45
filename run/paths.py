"""The paths of a configuration: absolute from the start on, whatever folder a process of the run stands in."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

from pydantic.fields import FieldInfo

from gflowvlm.run.models import shipped_models
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.settings import PathMarker, Settings

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")

Configured = TypeVar("Configured", bound=Settings)


class ConfiguredPath(NamedTuple):
    """A path in a configuration.

    Attributes:
        key: Its dotted key.
        value: What stands there.
        advice: What to do where there is no such folder.
    """

    key: str
    value: str
    advice: str

    @property
    def missing(self) -> UserError:
        """The error that there is no such folder."""
        return UserError(f"{self.key} = {self.value!r}: no such directory; {self.advice}")


def with_absolute_paths(settings: Configured, names: Collection[str] = ()) -> Configured:
    """Returns settings whose paths are absolute, against the folder that the process stands in.

    What is declared as a `ModelName` is a path when it begins with ``.``, ``/`` or ``~``, when there is such a folder,
    or when it cannot be a hub's name. The names of shipped models come first.

    Args:
        settings: A configuration, or any other settings.
        names: Further names that stand for no path.
    """
    changed: dict[str, object] = {}
    for key, field in type(settings).model_fields.items():
        value, marker = getattr(settings, key), _marker(field)
        if isinstance(value, Settings):
            changed[key] = with_absolute_paths(value, names)
        elif marker is not None and value is not None and _is_path(value, marker, names):
            # Not resolved: another machine may know the folder by this name only.
            changed[key] = os.path.abspath(Path(value).expanduser())
    return settings.model_copy(update=changed)


def configured_paths(settings: Settings, names: Collection[str] = ()) -> Iterator[ConfiguredPath]:
    """Yields the paths in settings, as they stand there; see `with_absolute_paths` for which texts are paths."""
    for key, field in type(settings).model_fields.items():
        value, marker = getattr(settings, key), _marker(field)
        if isinstance(value, Settings):
            yield from (path._replace(key=f"{key}.{path.key}") for path in configured_paths(value, names))
        elif marker is not None and value is not None and _is_path(value, marker, names):
            yield ConfiguredPath(key, value, marker.advice)


def check_paths(settings: Settings, names: Collection[str] = ()) -> None:
    """Makes sure that the folders of a configuration are there, wherever a process looks for them.

    Raises:
        UserError: One is not, or its path is relative; the message names its key.
    """
    check_absolute(settings, names)
    for path in configured_paths(settings, names):
        if not Path(path.value).is_dir():
            raise path.missing


def check_absolute(settings: Settings, names: Collection[str] = ()) -> None:
    """Makes sure that the paths of a configuration are the same folders for every process.

    Raises:
        UserError: A path is relative.
    """
    for path in configured_paths(settings, names):
        if not Path(path.value).is_absolute():
            raise UserError(f"{path.key} = {path.value!r}: is relative; a run needs the absolute path")


def _is_path(value: str, marker: PathMarker, names: Collection[str]) -> bool:
    if not marker.or_name:
        return True
    if value in names or value in shipped_models():
        return False
    return _HUB_NAME.fullmatch(value) is None or Path(value).is_dir()


def _marker(field: FieldInfo) -> PathMarker | None:
    # The metadata of `X | None` stands in the annotation of X.
    inside = (entry for part in get_args(field.annotation) for entry in getattr(part, "__metadata__", ()))
    return next((entry for entry in (*field.metadata, *inside) if isinstance(entry, PathMarker)), None)
