"""One command at a time in a folder; the lock goes with the process, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gflowvlm.shared.errors import UserError

LOCK = ".lock"
"""The file in the folder that is locked; it stays."""


@contextmanager
def folder_lock(folder: Path, refusal: UserError) -> Iterator[int]:
    """Holds a folder, which is made where it is missing, for one process.

    Args:
        folder: The folder.
        refusal: What is raised where another process holds it.

    Yields:
        The descriptor of the lock's file.

    Raises:
        UserError: Another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        yield descriptor
    finally:
        os.close(descriptor)
