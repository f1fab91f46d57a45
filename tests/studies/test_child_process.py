import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.studies import child_process
from gflowvlm.studies.child_process import run_command
from gflowvlm.studies.experiments.trial_process import TrialJob, run_trial
from gflowvlm.studies.experiments.trials import Command

ROOT = Path(__file__).parents[2]


def stand_in(folder, code, monkeypatch):
    """Has commands run some code."""
    script = folder / "stand_in.py"
    script.write_text(code)
    monkeypatch.setattr(child_process, "PROGRAM", (sys.executable, str(script)))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stands a module in for the command line: it says what it was asked, and does it."""
    stand_in(
        tmp_path,
        "import os, sys, time\n"
        "print('asked:', *sys.argv[1:], os.environ.get('TOLD'), flush=True)\n"
        "try:\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
        "    sys.exit(5)\n"
        "sys.exit(int(sys.argv[2]))\n",
        monkeypatch,
    )
    monkeypatch.setattr(child_process, "POLL_S", 0.05)
    return {"directory": str(tmp_path), "environment": {"PATH": os.environ["PATH"], "TOLD": "yes"}}


def test_the_status_of_a_command_that_ends_is_given_and_its_output_appended(commands, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    assert run_command(["0", "3"], log=log, **commands) == 3
    assert log.read_text() == "before\nasked: 0 3 yes\n"


def test_a_command_is_ours_whatever_its_working_directory_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.relpath(ROOT))
    for name in ("gflowvlm", "typer", "envs", "random"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(f"raise RuntimeError('the {name} of the working directory')")
    (tmp_path / "gflowvlm" / "__main__.py").touch()
    log = tmp_path / "log"
    assert run_command(["presets"], log=log, directory=str(tmp_path)) == 0, log.read_text()
    assert "numberline-tiny" in log.read_text()


def test_a_trial_that_is_to_stop_interrupts_its_command_although_ray_blocks_ctrl_c(commands, tmp_path, monkeypatch):
    log, stop = tmp_path / "log", tmp_path / "stop"
    monkeypatch.setenv("TOLD", "too much")
    command = Command(("60", "0"), tmp_path / "result", tmp_path / "result")
    job = TrialJob((command,), log, stop, commands["directory"], frozenset({"PATH"}))

    def trial():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        run_trial({"trial": "one"}, {"one": job})

    thread = threading.Thread(target=trial)
    thread.start()
    deadline = time.monotonic() + 30
    while not (log.exists() and "asked" in log.read_text()):
        assert time.monotonic() < deadline, "waited 30 s for the command to start"
        time.sleep(0.05)
    stop.touch()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert log.read_text() == "asked: 60 0 None\ninterrupted\n"


def test_ctrl_c_here_interrupts_the_command_once(commands, tmp_path):
    log = tmp_path / "log"

    def stop():
        if log.exists() and "asked" in log.read_text():
            raise KeyboardInterrupt
        return False

    assert run_command(["60", "0"], log=log, stop=stop, **commands) == INTERRUPTED
    assert log.read_text().endswith("interrupted\n")


def test_a_command_does_not_outlive_the_process_that_runs_it(commands, tmp_path):
    log = tmp_path / "log"
    code = (
        "import sys\nfrom pathlib import Path\nfrom gflowvlm.studies import child_process\n"
        f"child_process.PROGRAM = (sys.executable, {str(tmp_path / 'stand_in.py')!r})\n"
        f"child_process.run_command(['60', '0'], log=Path({str(log)!r}), directory={str(tmp_path)!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 30
        while not (children := [p for p in psutil.Process(parent.pid).children() if "60" in p.cmdline()]):
            assert time.monotonic() < deadline, "waited 30 s for the command to start"
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_a_second_ctrl_c_ends_a_command_that_does_not_heed_the_first(tmp_path, monkeypatch):
    log = tmp_path / "log"
    stand_in(
        tmp_path,
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
        "print('asked', os.getpid(), flush=True)\n"
        "while True: time.sleep(1)\n",
        monkeypatch,
    )
    monkeypatch.setattr(child_process, "POLL_S", 0.05)
    here = threading.get_ident()

    def again():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and "heard" not in log.read_text():
            time.sleep(0.05)
        signal.pthread_kill(here, signal.SIGINT)

    impatient = threading.Thread(target=again)

    def stop():
        if not (log.exists() and "asked" in log.read_text()):
            return False
        impatient.start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_command(["60", "0"], log=log, stop=stop, directory=str(tmp_path), environment={"PATH": os.environ["PATH"]})
    impatient.join(timeout=30)
    assert not psutil.pid_exists(int(log.read_text().split()[1]))
