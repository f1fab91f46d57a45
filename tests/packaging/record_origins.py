"""Started in every Python of an environment: records where each process finds certain packages.

Each process that imports one of the names in ``ORIGINS_NAMES`` appends lines of JSON to a file of its own in the
folder ``ORIGINS``: the process, what it imported, where that is, and, when it imports ``gflowvlm``, where it would find
each of the others. It changes nothing about what is imported.
"""

import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def _origin(name: str) -> str | None:
    spec = PathFinder.find_spec(name)
    return None if spec is None else str(Path(spec.origin or "").resolve())


class Recorder:
    """A finder that finds nothing and writes down what was asked for."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self._folder, self._names = Path(folder), names

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Records an import of one of the names; always leaves it to the next finder."""
        if name in self._names:
            seen = {other: _origin(other) for other in self._names} if name == "gflowvlm" else {}
            row = {"command": sys.orig_argv, "imported": name, "from": _origin(name), "sees": seen}
            with (self._folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return None


if "ORIGINS" in os.environ:
    sys.meta_path.insert(0, Recorder(os.environ["ORIGINS"], os.environ["ORIGINS_NAMES"].split(",")))
