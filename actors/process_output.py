"""What this process and those that it starts write to their standard outputs, watched on its way."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO, RawIOBase

_KEPT_BYTES = 64 * 2**10
_OUTPUTS = (1, 2)
_READ_BYTES = 2**16
_WRITTEN_S = 2.0
"""How long what ended processes have written may take to be read."""

_REASON_LINES, _REASON_CHARACTERS = 4, 400

# vLLM puts its processes' names and its log's head before each line.
_HEAD = re.compile(r"^(?:\([^)]* pid=\d+\) )?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^]]*\] ?)?")
_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?::.*)?")


class OutputTail:
    """The last of what was written; what was written goes where it would have gone.

    Args:
        kept: How many bytes that is.
    """

    def __init__(self, kept: int = _KEPT_BYTES) -> None:
        self._kept = kept
        self._bytes = bytearray()
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []

    def follow(self, reading: int, target: RawIOBase) -> None:
        """Reads a pipe to its end, in the background, and passes on what comes; closes both at the end."""
        self._readers.append(threading.Thread(target=self._forward, args=(reading, target), daemon=True))
        self._readers[-1].start()

    def add(self, data: bytes) -> None:
        """Takes what was written."""
        with self._lock:
            self._bytes += data
            del self._bytes[: -self._kept]

    def clear(self) -> None:
        """Forgets what was written so far."""
        with self._lock:
            self._bytes.clear()

    def last_line(self) -> str:
        """Returns the last line that was written so far; empty where there is none."""
        lines = (" ".join(line.split()) for line in reversed(self._text().splitlines()))
        return next((line for line in lines if line), "")

    def last_error(self) -> str | None:
        """Returns the last exception that was printed, type and message in one line; None where there was none."""
        for reader in self._readers:
            reader.join(_WRITTEN_S)
        lines = [_HEAD.sub("", line).rstrip() for line in self._text().splitlines()]
        last = max((number for number, line in enumerate(lines) if _ERROR.fullmatch(line)), default=None)
        if last is None:
            return None
        error = " ".join(" ".join(lines[last : last + _REASON_LINES]).split())
        return error[:_REASON_CHARACTERS]

    def _text(self) -> str:
        with self._lock:
            return self._bytes.decode(errors="replace")

    def _forward(self, reading: int, target: RawIOBase) -> None:
        with open(reading, "rb", buffering=0) as source, target:
            while data := source.read(_READ_BYTES):
                self.add(data)
                # A terminal that is gone, or a full disk: who writes must not stand still for it.
                with suppress(OSError, ValueError):
                    target.write(data)


@contextmanager
def output_tail() -> Iterator[OutputTail]:
    """Keeps the last of what this process, and processes started inside, write to stdout and stderr.

    Those processes keep the pipe that they were started with, so it is read for as long as one of them lives.
    """
    tail = OutputTail()
    usual = []
    for descriptor in _OUTPUTS:
        _flush()
        kept = os.dup(descriptor)
        reading, writing = os.pipe()
        os.dup2(writing, descriptor)
        os.close(writing)
        tail.follow(reading, FileIO(os.dup(kept), "w"))
        usual.append((descriptor, kept))
    try:
        yield tail
    finally:
        _flush()
        for descriptor, kept in usual:
            os.dup2(kept, descriptor)
            os.close(kept)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
