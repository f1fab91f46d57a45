"""Work in a process of its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar, cast

from gflowvlm.cluster.launch.process_environment import prepare_process
from gflowvlm.shared.errors import UserError

_Result = TypeVar("_Result")

STOP_TIMEOUT_S = 120.0


def in_own_process(work: Callable[..., _Result], *arguments: object) -> _Result:
    """Returns what a function returns in a new process, which ends in order when this one does, however that is.

    Ray Serve binds a process to the first event loop that it makes requests on, and a driver's processor time and
    memory are to be those of one run.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_to, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(f"the simulated run's process ended with status {process.exitcode}") from None
    finally:
        if process.is_alive():
            # As by Ctrl-C: it stops what it has started, then ends.
            process.terminate()
        process.join(STOP_TIMEOUT_S)
    if isinstance(result, UserError):
        raise result
    return cast(_Result, result)


def _report_to(sender: Connection, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare_process()
    try:
        sender.send(work(*arguments))
    except UserError as error:
        sender.send(error)
    except KeyboardInterrupt:
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
