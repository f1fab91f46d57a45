"""The event loop for code that is not asynchronous."""

import asyncio
import threading

import pytest

from gflowvlm.actors.event_loop import EventLoopThread


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
