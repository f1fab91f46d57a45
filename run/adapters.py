"""The run's published adapters on disk: which there are, and where one of them is."""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.errors import UserError

_NAME = re.compile(r"v(\d{8,})")


def adapter_versions(folder: RunFolder) -> list[int]:
    """Returns the versions whose adapters are there, oldest first; the newest is always among them."""
    if not folder.adapters.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.adapters.iterdir())
    return sorted(int(match[1]) for match in found if match is not None)


def published_adapter(folder: RunFolder, version: int) -> Path:
    """Returns the PEFT folder of a published version.

    Raises:
        UserError: It was never published or is removed; the message says which there are.
    """
    path = folder.adapter(version)
    if not path.is_dir():
        raise UserError(f"{folder.root}: {missing_version(version, adapter_versions(folder))}")
    return path


def missing_version(version: int, there: Sequence[int]) -> str:
    """Returns what to say of a version that is not among those that are there (ascending)."""
    if len(there) == 0:
        return f"there is no adapter version {version}, nor any other"
    if version > there[-1]:
        return f"adapter version {version} was never published; there are {_ranges(there)}"
    return f"adapter version {version} was removed (learner.keep_adapters); there are {_ranges(there)}"


def _ranges(versions: Sequence[int]) -> str:
    """Returns ascending numbers as text, those in a row as ``first-last``."""
    rows = [[v for _, v in row] for _, row in groupby(enumerate(versions), lambda placed: placed[1] - placed[0])]
    return ", ".join(str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows)
