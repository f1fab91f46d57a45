"""The event loop for code that is not asynchronous."""

import asyncio
import threading
import time

import pytest

from gflowvlm.actors.event_loop import EventLoopEndedError, EventLoopThread


@pytest.fixture
def loop():
    thread = EventLoopThread("test")
    yield thread
    thread.close()


async def _own_loop() -> int:
    return id(asyncio.get_running_loop())


def test_every_call_runs_on_the_same_loop(loop):
    assert loop.run(_own_loop()) == loop.run(_own_loop())


def test_background_tasks_go_on_between_calls(loop):
    done = threading.Event()

    async def start() -> asyncio.Task[None]:
        async def later() -> None:
            await asyncio.sleep(0.05)
            done.set()

        return asyncio.create_task(later())

    kept = loop.run(start())
    assert done.wait(timeout=5)
    assert kept is not None


def test_calls_from_several_threads_run_at_the_same_time(loop):
    both = asyncio.Barrier(2)

    async def meet() -> bool:
        async with asyncio.timeout(5):
            await both.wait()
        return True

    other = threading.Thread(target=lambda: loop.run(meet()))
    other.start()
    assert loop.run(meet())
    other.join(timeout=5)


def test_a_timeout_cancels_the_work(loop):
    cancelled = threading.Event()

    async def forever() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        loop.run(forever(), timeout_s=0.05)
    assert cancelled.wait(timeout=5)


def test_an_exception_reaches_the_caller(loop):
    async def fail() -> None:
        raise ValueError("reason")

    with pytest.raises(ValueError, match="reason"):
        loop.run(fail())


def test_closing_ends_the_thread():
    thread = EventLoopThread("test")
    assert thread.is_running
    thread.close()
    assert not thread.is_running


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_loop_that_ends_fails_all_who_wait_for_it_and_all_who_come_later_at_once(error):
    thread = EventLoopThread("test")
    failures = []

    async def forever() -> None:
        await asyncio.sleep(3600)

    async def fail() -> None:
        raise error

    def wait_for(work) -> None:
        with pytest.raises(EventLoopEndedError, match=type(error).__name__) as raised:
            thread.run(work)
        failures.append(raised.value)

    waiting = threading.Thread(target=wait_for, args=(forever(),))
    waiting.start()
    started = time.monotonic()
    wait_for(fail())
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    wait_for(forever())
    assert time.monotonic() - started < 5
    assert len(failures) == 3
    assert not thread.is_running


def test_a_loop_that_something_blocks_fails_all_who_wait_for_it():
    thread = EventLoopThread("test", blocked_s=0.6)
    released = threading.Event()

    async def block() -> None:
        released.wait()

    async def wait_long() -> str:
        await asyncio.sleep(1.5)
        return "done"

    try:
        # Waiting itself is no block.
        assert thread.run(wait_long()) == "done"
        with pytest.raises(EventLoopEndedError, match="has not returned"):
            thread.run(block())
        with pytest.raises(EventLoopEndedError):
            thread.run(wait_long())
    finally:
        released.set()
        thread.close()


def test_who_waits_while_it_is_closed_hears_of_it():
    thread = EventLoopThread("test")
    waits = threading.Event()

    async def forever() -> None:
        waits.set()
        await asyncio.sleep(3600)

    def close() -> None:
        waits.wait(5)
        thread.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(EventLoopEndedError, match="closed"):
        thread.run(forever())
    closing.join(5)


def test_work_can_be_awaited_on_another_loop_than_it_runs_on() -> None:
    loop = EventLoopThread("test")

    async def where() -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    async def from_another_loop() -> list[int]:
        return await asyncio.gather(*(loop.awaited(where()) for _ in range(3)))

    assert threading.get_ident() not in asyncio.run(from_another_loop())
    loop.close()
    with pytest.raises(EventLoopEndedError):
        asyncio.run(loop.awaited(where()))
