"""What stops a command: a closed terminal is the real thing, a pseudo-terminal whose other end goes."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gflowvlm.run.interruption import STOPPING, handled_by, hangup_ignored, termination_as_interrupt

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys, time
from pathlib import Path
from gflowvlm.run.interruption import termination_as_interrupt
folder = Path(sys.argv[1])
with termination_as_interrupt():
    try:
        (folder / "started").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        for stream in (sys.stdout, sys.stderr):
            print("an orderly end says something", file=stream, flush=True)
        (folder / "ended").touch()
"""


def wait_for(path, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.05)


def start_on_a_terminal(folder, *, ignored=False):
    """Runs the command on a terminal of its own; returns its process id and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", COMMAND, str(folder)])
    return pid, terminal


def test_a_closed_terminal_is_ctrl_c_and_what_is_printed_afterwards_does_no_harm(tmp_path):
    pid, terminal = start_on_a_terminal(tmp_path)
    wait_for(tmp_path / "started")
    os.close(terminal)
    wait_for(tmp_path / "ended")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_command_under_nohup_goes_on_without_its_terminal(tmp_path):
    pid, terminal = start_on_a_terminal(tmp_path, ignored=True)
    wait_for(tmp_path / "started")
    os.close(terminal)
    time.sleep(0.5)
    assert not (tmp_path / "ended").exists()
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_is_an_interrupt_inside_only(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), termination_as_interrupt():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_handler_takes_all_that_stops_a_command():
    taken = []
    with handled_by(lambda number, frame: taken.append(number), *STOPPING):
        for number in STOPPING:
            signal.raise_signal(number)
    assert taken == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def test_processes_started_with_hangup_ignored_outlive_a_closed_terminal():
    with hangup_ignored():
        process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
    finally:
        process.kill()
        process.wait(timeout=10)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
