"""How a command is stopped: Ctrl-C, SIGTERM and SIGHUP are the same to it, and its exit status says so."""

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status of a command that was stopped and can go on."""

TERMINATION = (signal.SIGTERM, signal.SIGHUP)
"""What stops a command as Ctrl-C does: a scheduler, or a terminal that was closed."""

STOPPING = (signal.SIGINT, *TERMINATION)
"""Everything that stops a command in order."""

_STANDARD_OUTPUTS = (1, 2)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise `KeyboardInterrupt` inside."""
    with handled_by(_interrupt, *TERMINATION):
        yield


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Has a handler take signals inside, and those from before take them again afterwards.

    A SIGHUP that is ignored stays ignored: the command was started with ``nohup``.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        _replace_closed_outputs()
        handler(number, frame)

    taken = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in taken}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def hangup_ignored() -> Iterator[None]:
    """Has processes that are started inside ignore SIGHUP.

    A terminal that is closed sends it to all of them at once, and what a command needs for its orderly end would be
    gone before the command has begun with it.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _replace_closed_outputs() -> None:
    """Lets go of a terminal or pipe that is gone: what is printed during an orderly end would fail and cut it short."""
    for descriptor in _STANDARD_OUTPUTS:
        watch = select.poll()
        watch.register(descriptor, 0)
        if any(events & (select.POLLHUP | select.POLLERR) for _, events in watch.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
