"""Processes that hold environments: what is slow in them blocks nobody, what kills one is survived."""

import asyncio
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from gflowvlm.actors.environments import EnvironmentLostError, InstanceSlot, View
from gflowvlm.actors.process_guard import ProcessGuard
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.task_settings import TaskSettings

ANSWER_S = 300.0
"""Longest an environment may take for one call: covers making a task's first games."""

_seats: dict[int, InstanceSlot] = {}
"""In a host's process: its environments by number."""


class EnvironmentHosts:
    """Some processes with any number of environments each. Use within one event loop.

    Args:
        settings: The task.
        processes: How many; they start when they are first needed.
        answer_s: Longest an environment may take for one call, seconds; then its process is replaced.
    """

    def __init__(self, settings: TaskSettings, processes: int, answer_s: float = ANSWER_S) -> None:
        self._hosts = [_Host(settings, answer_s) for _ in range(processes)]

    def open(self, group_index: int) -> "HostedEnvironment":
        """Returns a new environment in the host of a group; a group's environments share what its game costs."""
        return HostedEnvironment(self._hosts[group_index % len(self._hosts)])

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that run."""
        return [host.process.pid for host in self._hosts if host.process is not None and not host.process.over]

    def close(self) -> None:
        """Ends the processes."""
        for host in self._hosts:
            if host.process is not None:
                host.process.end()


class HostedEnvironment:
    """An environment in another process; see `gflowvlm.actors.environments.EpisodeEnvironment`.

    Every call raises `EnvironmentLostError` when its process has died since `start` or does not answer: the
    state is gone, and the episode has to be played again.
    """

    def __init__(self, host: "_Host") -> None:
        self._host = host
        self._process: _Process | None = None
        self._number = next(host.numbers)

    async def start(self, seed: int, split: str, wording: Sequence[int]) -> View:
        """Starts the instance of a seed; `wording` seeds the choice among an expert's wordings."""
        self._process = self._host.running()
        view: View = await self._call(_start, self._host.settings, seed, split, list(wording))
        return view

    async def act(self, action: str) -> View:
        """Takes an action."""
        view: View = await self._call(_act, action)
        return view

    async def demonstration(self) -> str:
        """Returns the expert's response at the current state."""
        return str(await self._call(_demonstration))

    def close(self) -> None:
        """Lets the environment go; calls that still run are not waited for."""
        if self._process is not None:
            self._process.send(_leave, self._number)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._process is None:
            raise RuntimeError("start the environment first")
        return await self._process.ask(function, self._number, *arguments)


class _Host:
    """One process at a time, a new one after each death."""

    def __init__(self, settings: TaskSettings, answer_s: float) -> None:
        self.settings = settings
        self.numbers = itertools.count()
        self.process: _Process | None = None
        self._answer_s = answer_s

    def running(self) -> "_Process":
        """Returns the process, started where there is none."""
        if self.process is None or self.process.over:
            self.process = _Process(self._answer_s)
        return self.process


class _Process:
    """One process from its start to its end."""

    def __init__(self, answer_s: float) -> None:
        # A pool of one keeps calls in order and notices at once when its process dies.
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=_IGNORE_CTRL_C
        )
        others = _children()
        self._pool.submit(os.getpid)
        (self.pid,) = _children() - others
        self.over = False
        self._answer_s = answer_s
        self._guard = ProcessGuard([self.pid])

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls without waiting; nothing happens where the process has died."""
        if not self.over:
            with suppress(BrokenProcessPool):
                self._pool.submit(function, *arguments)

    async def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result of a call."""
        what = f"process {self.pid}, which holds an environment,"
        if self.over:
            raise EnvironmentLostError(f"{what} has ended")
        try:
            future = asyncio.wrap_future(self._pool.submit(function, *arguments))
            return await asyncio.wait_for(future, self._answer_s)
        except BrokenProcessPool:
            self.end()
            raise EnvironmentLostError(f"{what} died") from None
        except TimeoutError:
            self.end()
            raise EnvironmentLostError(f"{what} did not answer for {self._answer_s:.0f} s") from None

    def end(self) -> None:
        """Ends the process at once: nothing in it is worth waiting for."""
        if self.over:
            return
        self.over = True
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._guard.release()


def _children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


_IGNORE_CTRL_C = (signal.SIGINT, signal.SIG_IGN)
"""Ctrl-C in a terminal reaches every process; what becomes of a host is its owner's to say."""


def _start(number: int, settings: TaskSettings, seed: int, split: str, wording: list[int]) -> View:
    return _seats.setdefault(number, InstanceSlot(make_env(settings))).start(seed, split, wording)


def _act(number: int, action: str) -> View:
    return _seats[number].act(action)


def _demonstration(number: int) -> str:
    return _seats[number].demonstration()


def _leave(number: int) -> None:
    seat = _seats.pop(number, None)
    if seat is not None:
        seat.close()
