"""The folder and the ports of a local Ray: whether it can start there. Does not import Ray."""

import os
import socket
import sys
import tempfile
from pathlib import Path

from gflowvlm.shared.errors import UserError

_SOCKET_BYTES = 107 if sys.platform.startswith("linux") else 103
"""Longest path of a socket that the system takes."""

_LONGEST_NAME = "session_2026-01-01_00-00-00_000000_0000000/sockets/dash_MetricsHead"
"""What Ray appends to its folder. It checks its own sockets only; a dashboard that has no room dies after a minute."""


def ray_folder() -> Path:
    """Returns the folder of a local Ray's sockets, logs and spilled objects."""
    system = "TMPDIR" if sys.platform.startswith("linux") else None
    named = os.environ.get("RAY_TMPDIR", os.environ.get(system, "/tmp") if system is not None else "/tmp")
    return Path(named, "ray")


def check_ray_folder() -> None:
    """Looks whether Ray's folder can be written, and has room for the names of its sockets.

    Raises:
        UserError: Ray could not start there.
    """
    folder = ray_folder()
    if not folder.is_absolute():
        raise UserError(f"Ray cannot start: its folder {str(folder)!r} is no absolute path; set RAY_TMPDIR to one")
    longest = len(os.fsencode(folder.resolve() / _LONGEST_NAME))
    if longest > _SOCKET_BYTES:
        raise UserError(
            f"Ray cannot start: the path of its folder {folder} is {longest - _SOCKET_BYTES} bytes too long for its "
            "sockets; set RAY_TMPDIR to a folder with a shorter path, such as /tmp"
        )
    try:
        # Others of the machine use it, too, as where Ray makes it itself.
        folder.mkdir(mode=0o777, parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="probe_", dir=folder) as probe,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        ):
            listener.bind(str(Path(probe, "socket")))
    except OSError as error:
        raise UserError(
            f"Ray cannot start: its folder {folder} cannot be used ({error.strerror or error}); "
            "set RAY_TMPDIR to a folder that can be written"
        ) from None


def is_free(port: int) -> bool:
    """Returns whether a port of this machine can be listened on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
