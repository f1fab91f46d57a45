"""Writing files that a reader, or a machine that comes back, finds whole."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Makes what a file holds, or which names a folder has, outlast a loss of power from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes a text file so that a reader sees all of it or none.

    Args:
        path: The file; replaced where there is one.
        text: Its content.
        durable: Whether it must outlast a loss of power from here on.

    Raises:
        OSError: It cannot be written; an earlier file is left as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if durable:
            sync(partial)
        partial.replace(path)
        if durable:
            sync(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
