"""Settings every test runs under."""

import os
import signal

import pytest

# Two cores are shared by everything a test starts; more threads only fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests never download: models and tasks are in the tree or generated.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# A shell's background jobs ignore Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

WHOLE_SYSTEM = (
    "test_baseline_runs.py",
    "test_doctor.py",
    "test_experiment_command.py",
    "test_scale.py",
    "test_serve_command.py",
    "test_submitted_runs.py",
    "test_training_run.py",
)
"""Files that start Ray with its dashboard: they wait a lot, and need the machine for one of them at a time."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist a file's tests stay together, and those of `WHOLE_SYSTEM` in one process."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = "whole system" if item.path.name in WHOLE_SYSTEM else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
