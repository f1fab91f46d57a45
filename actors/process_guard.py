"""Processes that must not outlive the one that started them, however it ends."""

import os
import signal
import subprocess
from collections.abc import Sequence


class ProcessGuard:
    """Kills processes when this one dies, `kill -9` included.

    A shell waits on a pipe whose other end only this process holds; the pipe closes with it.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        """Guards `pids` from now on."""
        command = f"cat > /dev/null; kill -9 {' '.join(map(str, pids))} 2> /dev/null"
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Whatever ends this process's group or session must leave the guard alive.
            start_new_session=True,
            cwd=os.sep,
        )

    def release(self) -> None:
        """Lets the processes be: they have ended in order, and their ids may come to belong to others."""
        if self._shell.poll() is None:
            os.killpg(self._shell.pid, signal.SIGKILL)
            self._shell.wait(timeout=10)
