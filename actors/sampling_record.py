"""What must outlive the process of the replay buffer's actor: which batch a step was given, and that sampling ended."""

import json
from pathlib import Path

from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole


class SamplingRecord:
    """The trajectories of the last steps' batches, on disk before anybody is given a batch.

    Attributes:
        closed: Whether no further step gets a batch.
    """

    def __init__(self, path: Path, owner: str) -> None:
        """Opens the record.

        Args:
            path: Its file.
            owner: Whose it is: what another owner, that is an earlier driver of the run, has left does not count.
        """
        self._path, self._owner = path, owner
        self.closed = False
        self._batches: dict[int, list[str]] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # None yet: it is written whole or not at all.
            return
        if found["owner"] == owner:
            self.closed = found["closed"]
            self._batches = {int(step): names for step, names in found["batches"].items()}

    def batch(self, step: int) -> list[str] | None:
        """Returns the ids of the trajectories that a step was given, in order; None where it was given none."""
        return self._batches.get(step)

    def note_batch(self, step: int, trajectory_ids: list[str]) -> None:
        """Records what a step is given, and forgets all but the step before it.

        Raises:
            UserError: The file cannot be written.
        """
        self._batches = {s: names for s, names in self._batches.items() if s == step - 1} | {step: trajectory_ids}
        self._write()

    def close(self) -> None:
        """Records that no further step gets a batch.

        Raises:
            UserError: The file cannot be written.
        """
        self.closed = True
        self._write()

    def _write(self) -> None:
        content = {"owner": self._owner, "closed": self.closed, "batches": self._batches}
        try:
            # Not synced: it has to survive this process, and the machine takes its driver with it.
            write_whole(self._path, json.dumps(content))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{self._path}: cannot be written ({reason}); free some space, then resume") from None
