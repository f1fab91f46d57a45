"""The replay buffer's files: one Parquet file per append, numbered, durable before it is acknowledged."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import sync
from gflowvlm.shared.trajectory import read_parquet

_NAME = re.compile(r"(\d{8,})\.parquet")


def trajectory_files(directory: Path) -> list[Path]:
    """Returns a folder's trajectory files in the order in which they were written.

    Unfinished files (``.partial``) were never acknowledged and are left out.
    """
    numbered = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


class TrajectoryFiles:
    """Appends record batches to a folder and reads them back in order.

    Attributes:
        directory: The folder; it is made when it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        """Opens the folder.

        Raises:
            UserError: The folder cannot be made or listed.
        """
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._files = trajectory_files(directory)
        except OSError as error:
            raise UserError(f"{directory}: the trajectories' folder cannot be used ({error.strerror})") from None
        self._next = int(self._files[-1].stem) + 1 if self._files else 0

    def read(self) -> Iterator[pa.RecordBatch]:
        """Yields the record batches that stood in the folder when it was opened, oldest first.

        Raises:
            UserError: A file is damaged or in another schema; the message names it.
        """
        for path in self._files:
            yield from read_parquet(path).combine_chunks().to_batches()

    def append(self, batch: pa.RecordBatch) -> None:
        """Writes one file; when this returns, the batch survives a crash of the machine.

        Raises:
            UserError: The disk is full or fails; nothing of the batch is left in the folder.
        """
        path = self.directory / f"{self._next:08d}.parquet"
        partial = path.with_name(path.name + ".partial")
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_batches([batch]), sink, compression="zstd")
        written = [partial]
        try:
            _write_durably(partial, sink.getvalue())
            os.replace(partial, path)
            written.append(path)
            sync(self.directory)
        except OSError as error:
            for leftover in written:
                _remove(leftover)
            raise UserError(
                f"{path}: trajectories cannot be written ({error.strerror}); free space there, "
                "then resume the run: everything acknowledged so far is safe"
            ) from None
        self._next += 1


def _write_durably(path: Path, content: pa.Buffer) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # The folder itself is gone or read-only: then there is nothing half-written in reach either.
        return
