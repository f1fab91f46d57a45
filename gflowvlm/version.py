"""Which release this is."""

import tomllib
from importlib import metadata
from pathlib import Path

NAME = "gflowvlm"
UNKNOWN = "0+unknown"


def version() -> str:
    """Returns the release: the checkout's own, else the installed distribution's, else `UNKNOWN`."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == NAME:
            return str(table["version"])
    try:
        return metadata.version(NAME)
    except metadata.PackageNotFoundError:
        return UNKNOWN
