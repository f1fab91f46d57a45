"""Starting whole runs in processes of their own, and reading what they leave."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from gflowvlm.run.log import read_rows
from gflowvlm.shared.config_io import load_config
from gflowvlm.shared.trajectory import from_arrow, read_parquet

ROOT = Path(__file__).parents[1]
MARK = "GFLOWVLM_TEST_RUN"


def start(*arguments, log):
    """Starts a run; everything it starts carries its log's path in the environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "gflowvlm.cli.main", "train", *map(str, arguments)],
        cwd=log.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", MARK: str(log)},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def wait_for(condition, what, run, log, timeout_s=300.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert run.poll() is None, f"the run ended while waiting for {what}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}:\n{log.read_text()[-4000:]}"
        time.sleep(0.2)


def finish(run, log, timeout_s=400.0):
    """Waits until a run has ended well."""
    try:
        assert run.wait(timeout=timeout_s) == 0, log.read_text()[-4000:]
    finally:
        run.kill()


def newest_step(folder):
    return max((r["step"] for r in read_rows(folder.metrics) if r["kind"] == "step"), default=0)


def processes_of(log, *names):
    """Processes of a run, those whose title holds one of the names where names are given."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(log) and process.status() != psutil.STATUS_ZOMBIE:
                title = " ".join(process.cmdline())
                if not names or any(name in title for name in names):
                    found.append(process)
        except psutil.Error:
            continue
    return found


def acknowledged(folder):
    return Counter(
        t.trajectory_id
        for path in sorted(folder.trajectories.glob("*.parquet"))
        for t in from_arrow(read_parquet(path))
    )


def assert_steps_and_versions_go_on(folder, last):
    steps = [r for r in read_rows(folder.metrics) if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, last + 1))
    versions = [r["version"] for r in steps]
    assert versions == sorted(set(versions))
    kept = versions[-load_config(folder.config).learner.keep_adapters :]
    assert [version for version in kept if not folder.adapter(version).is_dir()] == []


def assert_nothing_is_left(log):
    deadline = time.monotonic() + 60
    while left := processes_of(log):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
