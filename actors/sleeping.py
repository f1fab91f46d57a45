"""A sampler that sleeps while the learner steps, where both share one GPU: who waits, and whether it wakes up right."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gflowvlm.actors.sampling import PolicySampler, SamplerAsleepError, SamplerUnavailableError
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import BASE_VERSION

PROBE_TOKENS = 4
"""Tokens of the answer that is compared before and after a sleep."""

LIKELIEST = 20
"""The likeliest tokens that are compared at each of them; vLLM gives no more."""

Probe = list[dict[int, float]]
"""For each token of an answer, log-probabilities (nats) by token id; the first entry is the answer's own."""


@dataclass(frozen=True)
class SleepCheck:
    """What a sampler said before it went to sleep.

    Attributes:
        level: How deep it sleeps.
        version: Its newest version, which answered.
        probe: The answer.
    """

    level: int
    version: int
    probe: Probe

    def require_same(self, probe: Probe, limit: float) -> None:
        """Raises UserError when another answer to the same request differs by more than `limit` nats."""
        found = largest_difference(self.probe, probe)
        if found > limit:
            who = "the base model" if self.version == BASE_VERSION else f"adapter version {self.version}"
            advice = "1, or 0" if self.level == 2 else "0"
            raise UserError(
                f"sampler.sleep_level = {self.level}: {who} gives other log-probabilities after it was woken up, by up "
                f"to {found:.2g} nats (at most {limit:g} is rounding); set sampler.sleep_level={advice}"
            )


def largest_difference(one: Probe, other: Probe) -> float:
    """Returns the largest difference of two answers' log-probabilities, nats, up to the first token they differ in.

    Of tokens that are among the likeliest in both; where none is, the two have nothing in common: infinity.
    """
    largest = 0.0
    for first, second in zip(one, other, strict=False):
        common = first.keys() & second.keys()
        if not common:
            return float("inf")
        largest = max(largest, *(abs(first[token] - second[token]) for token in common))
        if next(iter(first)) != next(iter(second)):
            break
    return largest


class SamplerSleep:
    """Lets a sampler sleep when nobody uses it, and keeps everybody waiting until it is awake again.

    For use on one event loop.

    Args:
        sampler: The sampler.
        level: How deep it sleeps; see `PolicySampler.sleep`.
        patience_s: How long one call waits for a sampler that sleeps.
        drain_s: How long sleep waits for calls that are under way.
    """

    def __init__(self, sampler: PolicySampler, level: int, patience_s: float, drain_s: float) -> None:
        self._sampler, self._level = sampler, level
        self._patience_s, self._drain_s = patience_s, drain_s
        self._open, self._unused = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._unused.set()
        self._users = 0
        self._changing = asyncio.Lock()
        self._asleep = False

    @property
    def asleep(self) -> bool:
        """Whether the sampler sleeps."""
        return self._asleep

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Keeps the sampler awake for the block.

        Raises:
            SamplerAsleepError: It sleeps, and was not woken up in time.
        """
        while not self._open.is_set():
            try:
                await asyncio.wait_for(self._open.wait(), self._patience_s)
            except TimeoutError:
                raise SamplerAsleepError("the sampler sleeps while the learner steps") from None
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._unused.set()

    async def sleep(self) -> None:
        """Puts the sampler to sleep once the calls under way have ended; nothing happens where it sleeps already.

        Raises:
            SamplerUnavailableError: They have not ended in time; it stays awake.
        """
        async with self._changing:
            if self._asleep:
                return
            self._open.clear()
            try:
                await asyncio.wait_for(self._unused.wait(), self._drain_s)
                await self._sampler.sleep(self._level)
                self._asleep = True
            except TimeoutError:
                raise SamplerUnavailableError(
                    f"responses under way have not ended in {self._drain_s:g} s (sampler.request_timeout_s)"
                ) from None
            finally:
                if not self._asleep:
                    self._open.set()

    async def wake_up(self) -> None:
        """Wakes the sampler up and lets those in who wait; nothing happens where it is awake.

        Raises:
            UserError: It does not answer as before; nobody is let in.
        """
        async with self._changing:
            if self._asleep:
                await self._sampler.wake_up()
                self._asleep = False
                self._open.set()
