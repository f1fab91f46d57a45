"""Asks the policy server for responses, through replicas that die and come back."""

import asyncio
import time
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gflowvlm.actors.sampling import SamplerAsleepError, SampleRequest, SampleResponse, SamplerUnavailableError
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError, one_line

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0

TOGETHER = 16
"""Most requests in one call of the policy server."""

_TRY_AGAIN = (
    SamplerUnavailableError,
    RayServeException,
    RayActorError,
    ObjectLostError,
    TaskCancelledError,
    TimeoutError,
)

_Waiting = tuple[SampleRequest, "asyncio.Future[SampleResponse]"]


class PolicyServerError(RuntimeError):
    """No response came in time. Never a reason to give a trajectory a reward: the rollout is abandoned."""


@dataclass
class PolicyClient:
    """A client of the policy server, for use on an event loop; many requests may be in flight.

    A request that fails with its replica is asked again, of whichever replica answers; the response says
    which policy version made it. Requests made in the same moment share one call of the server, which costs
    as much CPU as half a tiny policy's response; each gets its response as soon as that is finished.

    Attributes:
        handle: The deployment's handle.
        request_timeout_s: Longest one try may take, seconds.
        deadline_s: Longest all tries of a request may take: covers the restart of a replica.
        sleep_timeout_s: Longest wait for a sampler that sleeps while the learner steps, which counts by itself.
        retries: Tries that failed so far and were repeated, over all requests.
    """

    handle: DeploymentHandle
    request_timeout_s: float
    deadline_s: float
    sleep_timeout_s: float = 3600.0
    retries: int = 0
    _waiting: "list[_Waiting]" = field(default_factory=list, init=False, repr=False)
    _exchanges: set[asyncio.Task[None]] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def from_config(cls, handle: DeploymentHandle, config: RunConfig) -> "PolicyClient":
        """Returns a client with the time limits of a run's configuration."""
        sampler = config.sampler
        deadline_s = sampler.start_timeout_s + sampler.request_timeout_s
        return cls(handle, sampler.request_timeout_s, deadline_s, sampler.sleep_timeout_s)

    @cached_property
    def _sample_together(self) -> DeploymentHandle:
        # Serve makes a new handle each time its method is named.
        return self.handle.options(stream=True).sample_together

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response.

        Raises:
            PolicyServerError: No replica answered before the deadline.
            UnknownVersionError: The request names a version that was never published.
            UserError: The request can never be answered, for example a prompt beyond the longest.
        """
        started = time.monotonic()
        pause, asleep_s = FIRST_PAUSE_S, 0.0
        while True:
            asked = time.monotonic()
            try:
                async with asyncio.timeout(self.request_timeout_s):
                    response = await self._answer(request)
            except SamplerAsleepError:
                asleep_s += time.monotonic() - asked
                if asleep_s > self.sleep_timeout_s:
                    raise PolicyServerError(
                        f"waited {asleep_s:.0f} s (sampler.sleep_timeout_s) for the sampler to be woken up"
                    ) from None
            except _TRY_AGAIN as error:
                waited = time.monotonic() - started - asleep_s
                if waited + pause > self.deadline_s:
                    raise PolicyServerError(
                        f"waited {waited:.0f} s for a response of {self.handle.deployment_name} in application "
                        f"{self.handle.app_name!r} (sampler.request_timeout_s, sampler.start_timeout_s): "
                        f"{_cause_of(error)}"
                    ) from None
                self.retries += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            except RayTaskError as error:
                raise error.cause from None
            else:
                return response

    async def sleep(self) -> None:
        """Puts every replica's sampler to sleep; see `PolicyServer.sleep`.

        Raises:
            PolicyServerError: Not all of them slept before the deadline.
            UserError: One of them cannot.
        """
        await self._tell_all("sleep")

    async def wake_up(self) -> None:
        """Wakes every replica's sampler up; see `PolicyServer.wake_up`.

        Raises:
            PolicyServerError: Not all of them were awake before the deadline.
            UserError: One of them does not answer as before.
        """
        await self._tell_all("wake_up")

    async def _tell_all(self, method: str) -> None:
        """Calls a method of every replica until all of them, one at least, have done what it says."""
        started = time.monotonic()
        while True:
            answers: list[Any]
            try:
                broadcast = self.handle.broadcast(method)
                answers = await broadcast.results_async(timeout_s=self.deadline_s, return_exceptions=True)
            except (RayServeException, RayError, TimeoutError) as error:
                answers = [error]
            problems = [answer for answer in answers if answer is not None]
            if answers and not problems:
                return
            refused = next((problem for problem in problems if isinstance(problem, UserError)), None)
            if refused is not None:
                raise refused
            if time.monotonic() - started > self.deadline_s:
                why = _cause_of(problems[0]) if problems else "no replica runs"
                raise PolicyServerError(
                    f"waited {self.deadline_s:.0f} s (sampler.request_timeout_s, sampler.start_timeout_s) for the "
                    f"policy server to {method.replace('_', ' ')}: {why}"
                )
            await asyncio.sleep(LONGEST_PAUSE_S)

    def _answer(self, request: SampleRequest) -> asyncio.Future[SampleResponse]:
        """Returns the future response of a request, which is sent with all others of this moment."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[SampleResponse] = loop.create_future()
        if len(self._waiting) == 0:
            loop.call_soon(self._send)
        self._waiting.append((request, answer))
        return answer

    def _send(self) -> None:
        # Given up before they were sent: a stopped rollout worker's.
        waiting = [(request, answer) for request, answer in self._waiting if not answer.done()]
        self._waiting = []
        # In parts, so that more than one replica has some.
        for start in range(0, len(waiting), TOGETHER):
            part = waiting[start : start + TOGETHER]
            exchange = asyncio.get_running_loop().create_task(self._sample_batch(part))
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._exchanges.discard)
            exchange.add_done_callback(partial(_settle_all, part))
            for _, answer in part:
                answer.add_done_callback(partial(_end_if_given_up, exchange, part))

    async def _sample_batch(self, waiting: "list[_Waiting]") -> None:
        """Asks a replica for several responses, and hands each over when it comes; see `_settle_all` for the rest."""
        stream = self._sample_together.remote([request for request, _ in waiting])
        async with asyncio.timeout(self.request_timeout_s):
            try:
                async for part in stream:
                    for place, answer in part:
                        _settle(waiting[place][1], answer)
            except asyncio.CancelledError:
                # Serve does not tell the replica of itself that nobody waits any more.
                stream.cancel()
                raise

    async def status(self, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """Returns every running replica's `PolicyServer.status`; replicas that do not answer are left out.

        Args:
            timeout_s: Longest wait, then nobody has answered; by default that of a request. Not to be cancelled
                from outside instead: Serve would leave an exception behind that nobody retrieves.
        """
        timeout_s = self.request_timeout_s if timeout_s is None else timeout_s
        try:
            broadcast = self.handle.broadcast("status")
            answers = await broadcast.results_async(timeout_s=timeout_s, return_exceptions=True)
        except (RayServeException, RayError, TimeoutError):
            return []
        return [answer for answer in answers if isinstance(answer, dict)]


def _end_if_given_up(
    exchange: asyncio.Task[None], waiting: "list[_Waiting]", answer: "asyncio.Future[SampleResponse]"
) -> None:
    """Ends a call that nobody waits for any more, and with it the engine's work on it."""
    if answer.cancelled() and all(response.done() for _, response in waiting):
        exchange.cancel()


def _settle_all(waiting: "list[_Waiting]", exchange: asyncio.Task[None]) -> None:
    """Gives those who still wait the reason why a call has ended, whatever ended it and wherever."""
    error: BaseException | None
    if exchange.cancelled():
        error = asyncio.CancelledError()
    else:
        error = exchange.exception() or SamplerUnavailableError("the policy server left a request without an answer")
    for _, response in waiting:
        _settle(response, error)


def _settle(response: "asyncio.Future[SampleResponse]", answer: SampleResponse | BaseException) -> None:
    if response.done():
        # Given up meanwhile, or answered before the call failed.
        return
    if isinstance(answer, SampleResponse):
        response.set_result(answer)
    elif isinstance(answer, asyncio.CancelledError):
        response.cancel()
    else:
        response.set_exception(answer)


def _cause_of(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__} {one_line(cause)}".strip()
