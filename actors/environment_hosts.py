"""Processes that hold environments: what is slow in them blocks nobody, what kills one is survived."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from gflowvlm.actors import environment_process
from gflowvlm.actors.environment_process import EnvironmentProcess
from gflowvlm.actors.environments import (
    EnvironmentFailedError,
    EnvironmentLostError,
    EpisodeEnvironment,
    LocalCalls,
    LocalEnvironment,
    View,
    instance_name,
    make_environment,
)
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import TaskSettings

CALL_TIMEOUT_S = 300.0
"""Longest an environment may take for one call where nobody says otherwise: covers making a task's first games."""


class EnvironmentHosts:
    """Where a task's environments run: in some processes with any number of them each, or in this one.

    Use within one event loop.

    Args:
        settings: The task.
        processes: How many processes hold environments, started when they are first needed; 0: this one does.
        timeout_s: Longest an environment in one of them may take for one call, seconds; then its process is replaced.
        calls: Is told which instance's code runs in this process.
    """

    def __init__(
        self,
        settings: TaskSettings,
        processes: int,
        timeout_s: float = CALL_TIMEOUT_S,
        calls: LocalCalls | None = None,
    ) -> None:
        self._settings = settings
        self._hosts = [_Host(settings, timeout_s) for _ in range(processes)]
        self._calls = calls

    def open(self, group_index: int) -> EpisodeEnvironment:
        """Returns a new environment; those of a group share a process, and what its game costs.

        Raises:
            EnvironmentFailedError: Its code failed where it was made.
            UserError: The task's settings allow no environment.
        """
        if not self._hosts:
            return LocalEnvironment(make_environment(self._settings), self._calls)
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

    async def close_and_settle(self) -> None:
        """Ends the processes, and returns when no call runs any more."""
        self.close()
        for host in self._hosts:
            if host.process is not None:
                await host.process.settled()


class HostedEnvironment:
    """An environment in another process; see `gflowvlm.actors.environments.EpisodeEnvironment`.

    Every call raises `EnvironmentFailedError` when its code fails, ends the process or does not return in time, and
    `EnvironmentLostError` when the process has ended since `start` for another reason: the state is gone, and the
    episode has to be played again.
    """

    def __init__(self, host: "_Host") -> None:
        self._host = host
        self._process: EnvironmentProcess | None = None
        self._number = next(host.numbers)
        self._instance = ""

    async def start(self, seed: int, split: str, wording: Sequence[int]) -> View:
        """Starts the instance of a seed; `wording` seeds the choice among an expert's wordings.

        Raises:
            UserError: The task's settings allow no environment.
        """
        settings = self._host.settings
        self._instance = instance_name(settings.name, split, seed)
        self._process = self._host.running()
        refused = await self._call(environment_process.make, settings)
        if refused is not None:
            raise UserError(refused)
        self._instance = await self._call(environment_process.name_of, seed, split)
        view: View = await self._call(environment_process.start, seed, split, list(wording))
        return view

    async def act(self, action: str) -> View:
        """Takes an action."""
        view: View = await self._call(environment_process.act, action)
        return view

    async def demonstration(self) -> str:
        """Returns the expert's response at the current state."""
        return str(await self._call(environment_process.demonstration))

    def close(self) -> None:
        """Lets the environment go; calls that still run are not waited for."""
        if self._process is not None:
            self._process.send(environment_process.close, self._number)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._process is None:
            raise RuntimeError("start the environment first")
        outcome = await self._process.ask(function, self._number, *arguments)
        if outcome.lost is not None:
            raise EnvironmentLostError(f"{self._instance}: {outcome.lost}")
        if outcome.failure is not None:
            raise EnvironmentFailedError(f"{self._instance}: {outcome.failure}")
        return outcome.value


class _Host:
    """One process at a time, a new one after each death."""

    def __init__(self, settings: TaskSettings, timeout_s: float) -> None:
        self.settings = settings
        self.numbers = itertools.count()
        self.process: EnvironmentProcess | None = None
        self._timeout_s = timeout_s

    def running(self) -> EnvironmentProcess:
        """Returns the process, started where there is none."""
        if self.process is None or self.process.over:
            try:
                self.process = EnvironmentProcess(self._timeout_s)
            except OSError as error:
                raise EnvironmentLostError(f"no process for an environment can be started ({error.strerror})") from None
        return self.process
