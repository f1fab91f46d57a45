"""metrics.jsonl: the run's log, one JSON object a line, appended to by learner and driver.

Kinds of rows: ``step`` (a learner step), ``rollout`` (a snapshot of the rollouts), ``evaluation``,
``learner`` (the learner started at a step), ``scale`` (other numbers of rollout workers and replicas, or why not),
``fatal`` (the learner cannot go on, with the reason).
A ``learner`` row with step s says that earlier rows of later steps were undone.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gflowvlm.shared.errors import UserError

Row = dict[str, Any]


def append_row(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Appends one row with a single write, so that rows of two processes never mix.

    Raises:
        UserError: The row cannot be written.
    """
    line = json.dumps({"kind": kind, "time": round(time.time(), 3), **content}) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free some space, then resume") from None


def read_rows(path: Path) -> list[Row]:
    """Returns the run's rows without those that a learner restart has undone; [] when there are none."""
    if not path.exists():
        return []
    tail = RowTail(path)
    rows: list[Row] = []
    for row in tail.new_rows():
        if row["kind"] == "learner":
            rows = [r for r in rows if not (r["kind"] == "step" and r["step"] > row["step"])]
        rows.append(row)
    return rows


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
