"""One GPU for sampler and learner: they take turns, the sampler asleep while the learner computes."""

import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ray import serve

from gflowvlm.actors.episode import ResponseSource
from gflowvlm.actors.event_loop import EventLoopThread
from gflowvlm.actors.policy_client import PolicyClient
from gflowvlm.actors.policy_server import DEPLOYMENT
from gflowvlm.actors.sampling import SampleRequest, SampleResponse
from gflowvlm.shared.config import RunConfig


class SleepingServer(Protocol):
    """What is asked of the policy server; see `PolicyClient`."""

    async def sleep(self) -> None:
        """Puts every sampler to sleep."""

    async def wake_up(self) -> None:
        """Wakes every sampler up."""


class MovingLearner(Protocol):
    """What is asked of the learner; see `Learner`."""

    def enter_device(self) -> None:
        """Brings the model to its device."""

    def leave_device(self) -> None:
        """Gives the device's memory back."""


@dataclass(frozen=True)
class _OnLoop:
    """Asks for responses on one loop, whoever asks."""

    source: ResponseSource
    loop: EventLoopThread

    async def sample(self, request: SampleRequest) -> SampleResponse:
        return await self.loop.awaited(self.source.sample(request))


class GpuTurns:
    """Lets a learner have the GPU that a sampler computes on.

    Args:
        server: The policy server; None where sampler and learner do not take turns, and nothing happens.
    """

    def __init__(self, server: SleepingServer | None) -> None:
        self._server = server
        self._loop = None if server is None else EventLoopThread("gpu-turns")
        self._seconds = 0.0

    @classmethod
    def of_run(cls, config: RunConfig, server_name: str) -> "GpuTurns":
        """Returns the turns that a run's configuration asks for, with the policy server of that name."""
        if config.sampler.sleep_level == 0:
            return cls(None)
        return cls(PolicyClient.from_config(serve.get_deployment_handle(DEPLOYMENT, server_name), config))

    @contextmanager
    def turn(self, learner: MovingLearner | None = None) -> Iterator[None]:
        """Has the samplers sleep inside, with the learner's model on its device; however the block ends.

        Args:
            learner: The learner; None while it is being made.

        Raises:
            PolicyServerError: The samplers could not be put to sleep or woken up in time.
            UserError: They do not answer as before.
        """
        if self._server is None or self._loop is None:
            yield
            return
        self._tell(self._loop, self._server.sleep())
        try:
            if learner is not None:
                learner.enter_device()
            yield
            if learner is not None:
                learner.leave_device()
        finally:
            self._tell(self._loop, self._server.wake_up())

    def on_own_loop(self, source: ResponseSource) -> ResponseSource:
        """Returns the policy server as it is asked for responses in this process, whatever loop asks.

        Ray Serve binds a process's requests to the loop that makes the first of them, which is that of the turns.
        """
        return source if self._loop is None else _OnLoop(source, self._loop)

    def take_seconds(self) -> float:
        """Returns how long going to sleep and waking up took since the last call of this."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def close(self) -> None:
        """Ends the thread that calls the server."""
        if self._loop is not None:
            self._loop.close()

    def _tell(self, loop: EventLoopThread, call: Coroutine[Any, Any, None]) -> None:
        started = time.monotonic()
        # No limit here: the client's calls have their own.
        loop.run(call)
        self._seconds += time.monotonic() - started
