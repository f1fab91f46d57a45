"""An event loop that lasts, for code that is not asynchronous itself."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")

STOP_TIMEOUT_S = 5.0

CANCEL_TIMEOUT_S = 60.0
"""How long work that was cancelled may take to end."""


class EventLoopThread:
    """An event loop running in a thread of its own until it is closed.

    Ray Serve binds a process's requests to the loop that makes the first of them, and hears of new replicas
    only while that loop runs; `asyncio.run` ends its loop with every call.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the loop still runs."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, _Result], timeout_s: float | None = None) -> _Result:
        """Returns what the coroutine returns, run on the loop; may be called from several threads.

        Raises:
            TimeoutError: It took longer than `timeout_s`; it is cancelled.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout=timeout_s)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=STOP_TIMEOUT_S)


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
