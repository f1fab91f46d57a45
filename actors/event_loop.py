"""An event loop that lasts, for code that is not asynchronous itself."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

_Result = TypeVar("_Result")

STOP_TIMEOUT_S = 5.0

CANCEL_TIMEOUT_S = 60.0
"""How long work that was cancelled may take to end."""

TURN_S = 0.5
"""How often the loop shows that it comes round, and waiting threads look."""


class EventLoopEndedError(RuntimeError):
    """The event loop that had the work has ended, or does not come round any more."""


class EventLoopThread:
    """An event loop running in a thread of its own until it is closed.

    Ray Serve binds a process's requests to the loop that makes the first of them, and hears of new replicas
    only while that loop runs; `asyncio.run` ends its loop with every call.

    A loop ends early when something on it raises what no loop survives (SystemExit, KeyboardInterrupt). Whoever waits
    for it then hears so at once.

    Args:
        name: Name of the thread.
        blocked_s: How long one piece of work may keep the loop from all others, seconds; then all calls fail.
            None waits for ever.
    """

    def __init__(self, name: str, blocked_s: float | None = None) -> None:
        self._name, self._blocked_s = name, blocked_s
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self._ended: str | None = None
        self._turned = time.monotonic()
        self._thread = threading.Thread(target=self._run_loop, name=name, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the loop takes work."""
        return self._ended is None

    def run(self, work: Coroutine[Any, Any, _Result], timeout_s: float | None = None) -> _Result:
        """Returns what the coroutine returns, run on the loop; may be called from several threads.

        Raises:
            TimeoutError: It took longer than `timeout_s`; it is cancelled.
            EventLoopEndedError: The loop has ended, or ends before the work does, or is blocked.
        """
        with self._lock:
            if self._ended is not None:
                work.close()
                raise EventLoopEndedError(f"the event loop of {self._name} has ended: {self._ended}")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._waiting.add(future)
        try:
            return self._wait(future, None if timeout_s is None else time.monotonic() + timeout_s)
        except BaseException:
            future.cancel()
            raise
        finally:
            with self._lock:
                self._waiting.discard(future)

    async def awaited(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Returns what the coroutine returns, run on this loop; to be awaited on another one.

        Raises:
            EventLoopEndedError: The loop has ended.
        """
        if self._ended is not None:
            work.close()
            raise EventLoopEndedError(f"the event loop of {self._name} has ended: {self._ended}")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def close(self) -> None:
        """Ends the loop and its thread; calls that still wait fail."""
        self._end("it was closed")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=STOP_TIMEOUT_S)

    def _wait(self, future: "Future[_Result]", deadline: float | None) -> _Result:
        while True:
            slices = [TURN_S] if deadline is None else [TURN_S, max(0.0, deadline - time.monotonic())]
            try:
                return future.result(timeout=min(slices))
            except TimeoutError:
                # The work's own, or that of this wait.
                if future.done() or (deadline is not None and time.monotonic() >= deadline):
                    raise
            still = time.monotonic() - self._turned
            if self._blocked_s is not None and still > self._blocked_s:
                self._end(f"something on it has not returned for {still:.0f} s")

    def _run_loop(self) -> None:
        self._loop.call_soon(self._note_turn)
        try:
            self._loop.run_forever()
        except BaseException as error:  # noqa: BLE001 - whatever it was, nobody may wait for this loop any more
            self._end(f"{type(error).__name__}: {error}")
        else:
            self._end("it was stopped")

    def _note_turn(self) -> None:
        self._turned = time.monotonic()
        self._loop.call_later(TURN_S, self._note_turn)

    def _end(self, reason: str) -> None:
        """Takes no more work, and fails what is waited for."""
        with self._lock:
            if self._ended is None:
                self._ended = reason
            for future in self._waiting:
                # Done in this moment, as far as the loop came.
                with suppress(InvalidStateError):
                    future.set_exception(EventLoopEndedError(f"the event loop of {self._name} has ended: {reason}"))


def run_to_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Returns what the coroutine returns, as `asyncio.run` does, also where this thread runs a loop (a notebook).

    Ctrl-C cancels it, and what it does to end in order is waited for.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    ended = threading.Event()

    async def noted() -> _Result:
        try:
            return await work
        finally:
            ended.set()

    loop = EventLoopThread("run-to-end")
    try:
        return loop.run(noted())
    except KeyboardInterrupt:
        ended.wait(timeout=CANCEL_TIMEOUT_S)
        raise
    finally:
        loop.close()
