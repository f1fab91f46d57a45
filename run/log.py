"""metrics.jsonl: the record of a run, one JSON object a line, appended to by its driver and by nobody else.

Nothing in a run is decided by what stands in it: it is for people, reports and plots. Kinds of rows: ``step`` (a
learner step), ``rollout`` (a snapshot of the rollouts), ``evaluation``, ``report`` (the evaluations at the end),
``learner`` (the learner started at a step), ``mismatch`` (the check of sampler against learner), ``scale`` (other
numbers of rollout workers and replicas, or why not), ``set_aside`` (a group that is not played any more, and why),
``fatal`` (the learner cannot go on, with the reason).
A ``learner`` row with step s says that earlier rows of later steps were undone, and so was a final report, which comes
after the learner's end. Of two evaluations of one step the later counts: the driver of the first one died before the
step was saved as evaluated.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gflowvlm.shared.errors import UserError

Row = dict[str, Any]

REPORT = "report"
"""Kind of the rows of the evaluations that end a run."""


def append_row(path: Path, kind: str, content: Mapping[str, Any], *, durable: bool = False) -> None:
    """Appends one row, all of it or nothing. For one process at a time: not every file system keeps two apart.

    A half line that a crash has left is closed first, so that it costs itself only.

    Args:
        path: The log; made where it is missing.
        kind: What the row is.
        content: Its figures.
        durable: Whether it must outlast a loss of power from here on.

    Raises:
        UserError: The row cannot be written.
    """
    line = (json.dumps({"kind": kind, "time": round(time.time(), 3), **content}) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            _write_all(descriptor, line, size)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free some space, then resume") from None


def _write_all(descriptor: int, data: bytes, size: int) -> None:
    """Writes all of the data at the end of a file, or cuts the file back to its size."""
    try:
        # A disk that fills up takes a part, and refuses the next write.
        while len(data) > 0:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def read_rows(path: Path) -> list[Row]:
    """Returns the run's rows without those that were undone or made again; [] when there are none."""
    if not path.exists():
        return []
    tail = RowTail(path)
    rows: list[Row] = []
    for row in tail.new_rows():
        if row["kind"] in ("learner", "evaluation"):
            rows = [earlier for earlier in rows if not _is_undone(earlier, row)]
        rows.append(row)
    return rows


def _is_undone(earlier: Row, row: Row) -> bool:
    """Whether a later row says that an earlier one does not count."""
    if row["kind"] == "learner":
        return earlier["kind"] == "report" or (earlier["kind"] == "step" and earlier["step"] > row["step"])
    return earlier["kind"] == "evaluation" and earlier["step"] == row["step"]


class RowTail:
    """Follows the log while others append to it.

    Args:
        path: The log; it need not exist yet.
        from_end: Whether to skip the rows that are there already.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def new_rows(self) -> list[Row]:
        """Returns the rows appended since the last call; a half-written line waits, a broken one is skipped."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [row for row in map(_parse, whole.splitlines()) if row is not None]


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None
