"""What one trial does in Ray Tune: its commands one after the other, each in a process of its own."""

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.studies.child_process import run_command
from gflowvlm.studies.experiments.trials import Command

_LAST_BYTES = 4096
_WARNING = re.compile(r"Warning: |warnings\.warn\(")


@dataclass(frozen=True)
class TrialJob:
    """One trial, as it is sent to its process.

    Attributes:
        commands: What it does.
        log: Where its commands write what they say.
        stop: The file that says that it is to stop, once it is there.
        directory: Working directory of the commands.
        variables: Names of the environment variables that the commands get: those of the user, and none of the
            ones that Ray sets for its workers.
    """

    commands: tuple[Command, ...]
    log: Path
    stop: Path
    directory: str
    variables: frozenset[str]


class TrialFailedError(RuntimeError):
    """A command of a trial ended badly."""


def run_trial(config: dict[str, Any], jobs: dict[str, TrialJob]) -> None:
    """Does what a trial has to do, for Ray Tune; returns early where it is to stop.

    Args:
        config: ``trial`` is the trial's name.
        jobs: All trials by name.

    Raises:
        TrialFailedError: A command ended badly; the trial may be tried again and goes on where it stood.
    """
    # Ray starts its processes with Ctrl-C blocked, and the commands would inherit it and never be stopped.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    run_job(jobs[config["trial"]])


def run_job(job: TrialJob) -> None:
    """Runs the commands that are not done yet; see `run_trial`."""
    environment = {name: value for name, value in os.environ.items() if name in job.variables}
    for command in job.commands:
        if job.stop.exists():
            return
        if command.result.exists():
            continue
        status = run_command(
            command.arguments,
            stop=job.stop.exists,
            log=job.log,
            directory=job.directory,
            environment=environment,
        )
        if job.stop.exists() and status != 0:
            return
        if status != 0:
            said = "interrupted" if status == INTERRUPTED else f"status {status}"
            raise TrialFailedError(f"`{command.arguments[0]}` ended ({said}): {last_log_lines(job.log)}")
        command.written.replace(command.result)


def last_log_lines(log: Path) -> str:
    """Returns the last line of a log that says anything; Python's warnings at its exit do not."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return "it said nothing"
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip() and not _WARNING.search(line)]
    return lines[-1] if lines else "it said nothing"
