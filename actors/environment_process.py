"""One process that holds environments: it takes one call at a time, and what becomes of a call is known.

The call that runs when the process dies, or that does not return, is the one that is to blame: the others only lose
their state with it.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from gflowvlm.actors.environments import (
    EnvironmentFailedError,
    InstanceSlot,
    View,
    make_environment,
    run_environment_code,
)
from gflowvlm.actors.process_guard import ProcessGuard
from gflowvlm.actors.process_output import OutputTail
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import TaskSettings

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

OUTPUT_KEPT = 2000
"""Bytes of what a process wrote last that are kept, for the reason of a failure."""

OUTPUT_PASSED_ON = 2**20
"""Bytes of a process's output that are passed on; an environment that writes without end fills no disk."""

OUTPUT_SETTLES_S = 0.1
"""How long after a failure what was written before it may take to arrive."""

LINE_CHARS = 200

_slots: dict[int, InstanceSlot] = {}
"""In the process: its environments by number."""

_begun: Any = None
"""In the process: memory that it shares with its owner, for the number of the last call that has begun."""


@dataclass(frozen=True)
class CallOutcome:
    """What became of a call. Travels between processes, so there is no object of the environment's in it.

    Attributes:
        value: What the call returned.
        failure: Why the environment's code failed, one line; None where it did not.
        lost: Why the state that the call needs is gone without the environment's fault; None where it is there.
    """

    value: Any = None
    failure: str | None = None
    lost: str | None = None


class EnvironmentProcess:
    """One process from its start to its end. Use within one event loop.

    Args:
        timeout_s: Longest that one call may take, seconds; then the process is ended.

    Attributes:
        pid: Id of the process.
        over: Whether it has ended.

    Raises:
        OSError: The system starts no process.
    """

    def __init__(self, timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        reader, writer = context.Pipe(duplex=False)
        # A pool of one notices at once when its process dies.
        self._begun = context.RawValue("Q", 0)
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(writer, self._begun))
        others = {child.pid for child in multiprocessing.active_children()}
        self._pool.submit(os.getpid)
        (self._child,) = (child for child in multiprocessing.active_children() if child.pid not in others)
        writer.close()
        assert self._child.pid is not None
        self.pid = self._child.pid
        self.over = False
        self._timeout_s = timeout_s
        self._output = OutputTail(OUTPUT_KEPT)
        self._output.follow(os.dup(reader.fileno()), _LimitedOutput())
        reader.close()
        self._guard = ProcessGuard([self.pid])
        self._turn = asyncio.Lock()
        self._calls_made = 0
        self._calls: set[asyncio.Task[CallOutcome]] = set()
        self._why = "it was ended"

    async def ask(self, function: Callable[..., Any], *arguments: Any) -> CallOutcome:
        """Returns what became of a call; one that has begun goes on when nobody waits for it any more."""
        return await asyncio.shield(self._begin(function, *arguments))

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls without waiting; nothing happens where the process has ended."""
        if not self.over:
            self._begin(function, *arguments)

    def end(self, why: str = "it was ended") -> None:
        """Ends the process at once: nothing in it is worth waiting for."""
        if self.over:
            return
        self.over, self._why = True, why
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._guard.release()

    async def settled(self) -> None:
        """Returns when no call runs any more; for the time after `end`."""
        await asyncio.gather(*self._calls)

    def _begin(self, function: Callable[..., Any], *arguments: Any) -> "asyncio.Task[CallOutcome]":
        call = asyncio.get_running_loop().create_task(self._in_turn(function, *arguments))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _in_turn(self, function: Callable[..., Any], *arguments: Any) -> CallOutcome:
        async with self._turn:
            if self.over:
                return self._lost()
            self._output.clear()
            try:
                if wait([self._child.sentinel], timeout=0):
                    # Before the pool has noticed: its error would look like that of this call.
                    raise BrokenProcessPool
                self._calls_made += 1
                future = asyncio.wrap_future(self._pool.submit(_guarded, self._calls_made, function, *arguments))
            except BrokenProcessPool:
                # Between two calls: somebody else ended it.
                self.end(f"it {self._death()}")
                return self._lost()
            try:
                outcome = await asyncio.wait_for(future, self._timeout_s)
            except BrokenProcessPool:
                if 0 < self._begun.value < self._calls_made:
                    # It was dying already, which shows only when the last of its threads has ended.
                    self.end(f"it {self._death()}")
                    return self._lost()
                return await self._failed(f"its process {self.pid} {self._death()}")
            except asyncio.CancelledError:
                # `end` takes back what the pool has not begun.
                if self.over:
                    return self._lost()
                raise
            except TimeoutError:
                return await self._failed(
                    f"did not return in {self._timeout_s:g} s (rollout.environment_timeout_s); its process was ended"
                )
            if outcome.failure is not None:
                return CallOutcome(failure=await self._with_output(outcome.failure))
            return outcome

    async def _failed(self, failure: str) -> CallOutcome:
        ended_by_others = self._why if self.over else None
        self.end("another environment in it failed")
        if ended_by_others is not None:
            return self._lost()
        return CallOutcome(failure=await self._with_output(failure))

    def _lost(self) -> CallOutcome:
        return CallOutcome(lost=f"process {self.pid}, which held it, is gone: {self._why}")

    async def _with_output(self, failure: str) -> str:
        await asyncio.sleep(OUTPUT_SETTLES_S)
        line = self._output.last_line()[:LINE_CHARS]
        return f"{failure} (it said: {line})" if line else failure

    def _death(self) -> str:
        """Returns how the process ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        code = self._child.exitcode
        if code is None or code >= 0:
            return f"exited with status {code}"
        return f"was killed by {signal.Signals(-code).name}"


class _LimitedOutput(RawIOBase):
    """Passes on to stderr so much of what a process writes."""

    def __init__(self) -> None:
        self._left = OUTPUT_PASSED_ON

    def writable(self) -> bool:
        """Whether it can be written to: yes."""
        return True

    def write(self, data: "ReadableBuffer") -> int:
        """Passes on what is still allowed, and says so when that was the last of it."""
        chunk = bytes(data)
        if self._left > 0:
            passed, self._left = chunk[: self._left], self._left - len(chunk)
            text = passed.decode(errors="replace")
            sys.stderr.write(text if self._left > 0 else f"{text}\n(more output of this environment is not shown)\n")
            sys.stderr.flush()
        return len(chunk)


# In the process


def _prepare(output: Connection, begun: Any) -> None:
    global _begun
    _begun = begun
    # Ctrl-C in a terminal reaches every process; what becomes of this one is its owner's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    for text in (sys.stdout, sys.stderr):
        # A process that dies leaves nothing in a buffer.
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _guarded(number: int, function: Callable[..., Any], *arguments: Any) -> CallOutcome:
    """Returns what became of a call. Exceptions of the environment's do not travel: they may not even be picklable."""
    _begun.value = number
    try:
        return CallOutcome(run_environment_code(function, *arguments))
    except (EnvironmentFailedError, KeyboardInterrupt) as error:
        return CallOutcome(failure=str(error) or type(error).__name__)


def make(number: int, settings: TaskSettings) -> str | None:
    """Makes an environment; returns why its task's settings allow none, None where they do."""
    try:
        _slots[number] = InstanceSlot(make_environment(settings))
    except EnvironmentFailedError:
        raise
    except UserError as refusal:
        return str(refusal)
    return None


def name_of(number: int, seed: int, split: str) -> str:
    """See `InstanceSlot.name_of`."""
    return _slots[number].name_of(seed, split)


def start(number: int, seed: int, split: str, wording: list[int]) -> View:
    """See `EpisodeEnvironment.start`."""
    return _slots[number].start(seed, split, wording)


def act(number: int, action: str) -> View:
    """See `EpisodeEnvironment.act`."""
    return _slots[number].act(action)


def demonstration(number: int) -> str:
    """See `EpisodeEnvironment.demonstration`."""
    return _slots[number].demonstration()


def close(number: int) -> None:
    """Closes an environment."""
    slot = _slots.pop(number, None)
    if slot is not None:
        slot.close()
