"""Commands of ours in processes of their own: stopped as by Ctrl-C, and gone when the one that started them is."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gflowvlm.actors.process_guard import ProcessGuard
from gflowvlm.cluster.launch.process_environment import package_path
from gflowvlm.run.interruption import INTERRUPTED

PROGRAM = (sys.executable, "-P", "-m", "gflowvlm")
"""The command line, in a Python that does not import from its working directory."""

CHILD_END_S = 300.0
"""How long an interrupted command may take to end."""

POLL_S = 0.5


def run_command(
    arguments: Sequence[str],
    *,
    stop: Callable[[], bool] = lambda: False,
    log: Path | None = None,
    directory: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs `gflowvlm ARGUMENTS` to its end, or until it is to stop.

    Args:
        arguments: The command and its arguments.
        stop: Asked twice a second; True interrupts the command, as does Ctrl-C here.
        log: File its output is appended to; by default it goes where this process's goes.
        directory: Its working directory; this process's by default.
        environment: Its environment; this process's by default.

    Returns:
        Its exit status, `INTERRUPTED` whenever it was interrupted from here.
    """
    # Our package, whatever the working directory holds.
    variables = {**(os.environ if environment is None else environment), "PYTHONPATH": package_path()}
    output = None if log is None else log.open("ab")
    try:
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        child = subprocess.Popen(
            [*PROGRAM, *arguments],
            start_new_session=True,
            stdout=output,
            stderr=output,
            cwd=directory,
            env=variables,
        )
        guard = ProcessGuard([child.pid])
        try:
            return _wait(child, stop)
        finally:
            if child.poll() is None:
                # A second Ctrl-C does not wait for the child to end.
                child.kill()
                child.wait(timeout=CHILD_END_S)
            guard.release()
    finally:
        if output is not None:
            output.close()


def _wait(child: "subprocess.Popen[bytes]", stop: Callable[[], bool]) -> int:
    try:
        while not stop():
            try:
                return child.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                continue
    except KeyboardInterrupt:
        pass
    child.send_signal(signal.SIGINT)
    try:
        child.wait(timeout=CHILD_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(timeout=CHILD_END_S)
    return INTERRUPTED
