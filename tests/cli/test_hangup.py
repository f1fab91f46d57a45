"""A terminal that is closed over a run: the run ends in order and can be resumed, and nothing of it is left."""

import os
import pty
import sys
import threading
import time

import pytest

from gflowvlm.run.checkpoints import checkpoint_steps
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.interruption import INTERRUPTED
from tests.whole_runs import MARK, ROOT, assert_nothing_is_left, newest_step

pytestmark = pytest.mark.slow

SETTINGS = (
    "learner.steps=200",
    "evaluation.at_start=false",
    "evaluation.every=1000",
    "sampler.engine=transformers",
    "cluster.dashboard=false",
    "learner.groups_per_batch=2",
    "rollout.group_size=4",
    "rollout.groups_per_worker=2",
)
NAME = "try[lr=1e-3] läuf 日本"
"""Read as markup, a tag or a label, it would be swallowed or end the run."""

START_S, END_S = 300.0, 200.0


def start_on_a_terminal(folder, mark):
    """Starts a run on a terminal of its own; returns its process id and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(ROOT), MARK: str(mark), "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-P", "-m", "gflowvlm", "train", "--run", NAME, *SETTINGS])
    return pid, terminal


def read_on(terminal, printed):
    """Reads what the run prints, as a terminal does, until that is closed."""
    while True:
        try:
            printed.append(os.read(terminal, 2**16))
        except OSError:
            return


def waited_for(pid, timeout_s):
    """Returns a process's exit status."""
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline, "the run did not end"
        time.sleep(0.2)


def test_a_run_whose_terminal_is_closed_ends_in_order(tmp_path):
    mark, printed, folder = tmp_path / "mark", [], RunFolder(tmp_path / NAME)
    pid, terminal = start_on_a_terminal(tmp_path, mark)
    threading.Thread(target=read_on, args=(terminal, printed), daemon=True).start()
    deadline = time.monotonic() + START_S
    while newest_step(folder) < 2:
        assert time.monotonic() < deadline, b"".join(printed)[-4000:].decode(errors="replace")
        time.sleep(0.5)
    assert f"run folder: {NAME}" in b"".join(printed).decode()
    os.close(terminal)
    assert waited_for(pid, END_S) == INTERRUPTED
    assert_nothing_is_left(mark)
    assert max(checkpoint_steps(folder.checkpoints)) >= 2
    assert not folder.summary.exists()
