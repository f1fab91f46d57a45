"""Keeps the engines' own messages off the screen, unless something goes wrong."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN_BYTES = 4000


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Sends what this process and its children write to stderr to a file; shows its end on an exception."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        usual = os.dup(2)
        os.dup2(log.fileno(), 2)
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(usual, 2)
            os.close(usual)
            if failed:
                log.seek(max(0, log.seek(0, os.SEEK_END) - SHOWN_BYTES))
                os.write(2, log.read())
