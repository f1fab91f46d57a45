"""Making the models that an experiment's runs start from."""

import json
from collections.abc import Callable
from pathlib import Path

from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.child_process import run_command
from gflowvlm.studies.experiments.description import WarmStart

_REPORT = "training.json"


def is_made(folder: Path) -> bool:
    """Returns whether `gflowvlm sft` has finished the model in a folder."""
    try:
        return "final_loss" in json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def warm_start_command(start: WarmStart, folder: Path) -> tuple[str, ...]:
    """Returns the command that makes a model, or goes on with it where it was stopped."""
    if (folder / "checkpoint").is_dir():
        return ("sft", "--resume", "--out", str(folder))
    return ("sft", "--out", str(folder), *start.arguments)


def make_warm_start(start: WarmStart, folder: Path, stop: Callable[[], bool]) -> bool:
    """Makes a model in a process of its own, whose progress is shown as it is.

    Args:
        start: What is made.
        folder: Its folder.
        stop: Asked now and then; True interrupts it.

    Returns:
        Whether it is made (and was not interrupted).

    Raises:
        UserError: It could not be made.
    """
    status = run_command(warm_start_command(start, folder), stop=stop)
    if status == INTERRUPTED:
        return False
    if status != 0 or not is_made(folder):
        raise UserError(f"{folder}: `gflowvlm sft` ended with status {status}, see above; the same command tries again")
    return True
