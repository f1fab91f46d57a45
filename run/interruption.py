"""How a command is stopped: Ctrl-C and SIGTERM are the same to it, and its exit status says so."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status of a command that was stopped and can go on."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise `KeyboardInterrupt` inside."""
    with handled_by(_interrupt, signal.SIGTERM):
        yield


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Has a handler take signals inside, and those from before take them again afterwards."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
