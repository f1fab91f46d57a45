import os
import signal
import subprocess
import sys
import time

from gflowvlm.actors.process_guard import ProcessGuard

PARENT = """
import subprocess, sys, time
from gflowvlm.actors.process_guard import ProcessGuard
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
guard = ProcessGuard([child.pid])
print(child.pid, guard._shell.pid, flush=True)
time.sleep(300)
"""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid):
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_guarded_process_goes_with_a_killed_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    child, guard = map(int, parent.stdout.readline().split())
    assert is_running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=10)
    wait_until_gone(child)
    wait_until_gone(guard)


def test_a_released_process_lives_on():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        guard = ProcessGuard([child.pid])
        guard.release()
        time.sleep(0.2)
        assert child.poll() is None
        assert not is_running(guard._shell.pid)
    finally:
        child.kill()
        child.wait(timeout=10)
