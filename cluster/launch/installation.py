"""Where this installation of the package is."""

from pathlib import Path


def installation() -> Path:
    """Returns the folder that holds the package of this process: of a source tree, or of installed packages."""
    # Not resolved: in a source tree the package reaches this file through a link.
    return Path(__file__).parents[3]
