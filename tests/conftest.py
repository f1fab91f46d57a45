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
# Under nohup they would ignore a closed terminal.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST_FIRST = (
    "test_training_run.py",
    "test_submitted_runs.py",
    "test_baseline_runs.py",
    "test_experiment_command.py",
    "test_policy_server.py",
    "test_bench.py",
    "test_serve_command.py",
    "test_installed_wheel.py",
    "test_scale.py",
    "test_sharding.py",
)
"""Files that take minutes. `make test` runs two files at a time; none of these is to be left alone at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the longest files first."""
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
