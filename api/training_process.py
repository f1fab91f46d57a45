"""The process of `gflowvlm train` that a training from Python is."""

import os
import sys
import tempfile
from pathlib import Path

from gflowvlm.run.folder import RunFolder
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.child_process import run_command

_COLOUR = ("FORCE_COLOR", "CLICOLOR_FORCE")

SAID_LINES = 20
"""Last lines of a failed training that its error shows."""


def train_to_the_end(folder: RunFolder, *, progress: bool) -> None:
    """Trains a run to its last learner step, from where it stands.

    Args:
        folder: The run's folder, with its configuration.
        progress: Whether to print what the command says.

    Raises:
        UserError: It failed; the message says why.
        KeyboardInterrupt: It was stopped and can go on.
    """
    with tempfile.TemporaryDirectory(prefix="gflowvlm-train-") as scratch:
        log = Path(scratch) / "output"
        output = _Output(log, progress)
        # A notebook's kernel asks for colour, and what is read here is no terminal.
        environment = {name: value for name, value in os.environ.items() if name not in _COLOUR}
        command = ["train", "--resume", str(folder.root)]
        status = run_command(command, stop=output.more, log=log, environment=environment)
        output.more()
    if status == INTERRUPTED:
        if progress:
            print(f"interrupted; go on with: gflowvlm.Run({str(folder.root)!r}).resume()")
        raise KeyboardInterrupt
    if status != 0:
        raise UserError(output.reason(status))


class _Output:
    """What the training process has said, printed as it comes."""

    def __init__(self, log: Path, shown: bool) -> None:
        self._log, self._shown = log, shown
        self._offset = 0
        self._lines: list[str] = []

    def more(self) -> bool:
        """Takes up what was said since the last call; False, for nothing here stops the training."""
        if self._log.exists():
            with self._log.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            lines = whole.decode(errors="replace").splitlines()
            self._lines = [*self._lines, *lines][-SAID_LINES:]
            if self._shown:
                for line in lines:
                    print(line)
                sys.stdout.flush()
        return False

    def reason(self, status: int) -> str:
        """Returns why it failed, as one line where the command says so, else with its last lines."""
        mark = "gflowvlm: "
        for line in reversed(self._lines):
            if line.startswith(mark):
                return line.removeprefix(mark)
        return "\n".join([f"gflowvlm train ended with status {status}; it said last:", *self._lines])
