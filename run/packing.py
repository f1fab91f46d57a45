"""What of this installation travels to a cluster: the package, whether a source tree or a wheel holds it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gflowvlm.shared.errors import UserError

PACKAGE = "gflowvlm"
MAX_MIB = 64.0
"""Most that travels, MiB."""

_MIB = 2**20
_NAMED_FILES = 3


def travelling_files(root: Path) -> Iterator[Path]:
    """Yields the files that travel, relative to `root`.

    Only the package is looked at, so that neither tests nor what lies beside it (``.git``, ``.venv``, ``runs``) is.
    In a source tree its rooms are links, which are followed; inside them, what is hidden, caches, links, virtual
    environments and folders of runs are left out.
    """
    package = root / PACKAGE
    rooms = sorted(path for path in package.iterdir() if path.is_dir() and _may_travel(path))
    yield from sorted(path.relative_to(root) for path in package.iterdir() if path.is_file() and path.suffix == ".py")
    for room in rooms:
        for where, folders, files in os.walk(room):
            folders[:] = sorted(name for name in folders if _travels(Path(where, name)))
            for name in sorted(files):
                path = Path(where, name)
                if not name.startswith(".") and path.suffix not in (".pyc", ".pyo") and not path.is_symlink():
                    yield path.relative_to(root)


def _travels(folder: Path) -> bool:
    return _may_travel(folder) and not folder.is_symlink()


def _may_travel(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or folder.name in ("__pycache__", "runs")
    return not (hidden or (folder / "pyvenv.cfg").exists())


def pack(root: Path, target: Path, limit_mib: float = MAX_MIB) -> float:
    """Copies what travels into an empty folder.

    Args:
        root: The folder that holds the package.
        target: Where to.
        limit_mib: Most that may travel, MiB.

    Returns:
        How much it is, MiB.

    Raises:
        UserError: It is more than the limit; the message names the largest files.
    """
    sizes = {path: (root / path).stat().st_size for path in travelling_files(root)}
    total = sum(sizes.values()) / _MIB
    if total > limit_mib:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:_NAMED_FILES]
        named = ", ".join(f"{path} ({sizes[path] / _MIB:.1f} MiB)" for path in largest)
        raise UserError(
            f"{root}: {total:.1f} MiB would travel to the cluster, at most {limit_mib:g} may; largest: {named}; "
            "move out what is not code"
        )
    for path in sizes:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, target / path)
    return total
