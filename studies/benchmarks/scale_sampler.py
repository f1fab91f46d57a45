"""A simulated engine: answers with recorded responses after a delay, and computes nothing.

Whatever stands around an engine is real: the policy server's replicas and clients, the adapter store, and the
account of adapter versions. Imported by every replica, so this module brings no large library.
"""

import asyncio
import heapq
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gflowvlm.actors.sampling import AdapterVersions, SampleRequest, SampleResponse
from gflowvlm.shared.config import RunConfig

REMEMBERED_LOADS = 64


@dataclass(frozen=True)
class RecordedResponse:
    """A response that was made beforehand.

    Attributes:
        token_ids: Its tokens, end token last.
        log_probs: A log-probability for each, nats.
        text: Their text.
    """

    token_ids: list[int]
    log_probs: list[float]
    text: str


@dataclass(frozen=True)
class SimulatedEngine:
    """What the simulated engines do; a `SamplerFactory`.

    Attributes:
        responses: One of these is drawn for each request, whatever it shows or asks.
        response_s: Mean time that a response takes once it has a place, seconds.
        spread: Sigma of the log-normal distribution of that time; 0 makes it constant.
        load_s: Time to load an adapter, seconds.
    """

    responses: tuple[RecordedResponse, ...]
    response_s: float
    spread: float
    load_s: float

    def __call__(
        self, config: RunConfig, model_path: str, engine: str, path_of: Callable[[int], Awaitable[Path]] | None
    ) -> "SimulatedSampler":
        """Starts an engine with `sampler.max_num_seqs` places."""
        return SimulatedSampler(self, config.sampler.max_num_seqs, path_of)

    def duration(self, rng: random.Random) -> float:
        """Draws the time of one response, seconds."""
        # A log-normal variable of this mean.
        return self.response_s * math.exp(rng.gauss(0.0, self.spread) - self.spread**2 / 2)


class SimulatedSampler:
    """A `PolicySampler` without a model.

    It has so many places; a request takes the first that is free and holds it for the drawn time, the others
    wait in order. When a place is free again is the engine's own clock, as on a GPU: a host that is late to
    fetch an answer does not hold the next one up.

    Args:
        engine: What is simulated.
        places: Requests that are answered at the same time.
        path_of: Finds the adapter of a version that a request names.
    """

    def __init__(
        self, engine: SimulatedEngine, places: int, path_of: Callable[[int], Awaitable[Path]] | None = None
    ) -> None:
        self._engine = engine
        self._free_at = [0.0] * places
        self._random = random.Random()
        self._versions = AdapterVersions(self._load, self._forget, path_of)
        self._simulated_s = 0.0
        self._newest_since: dict[int, float] = {}

    @property
    def newest(self) -> int:
        """The version that answers requests which name none."""
        return self._versions.newest

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Returns a recorded response after the simulated time."""
        async with self._versions.admit(request.version) as version:
            duration = self._engine.duration(self._random)
            end = max(time.monotonic(), heapq.heappop(self._free_at)) + duration
            heapq.heappush(self._free_at, end)
            await asyncio.sleep(max(0.0, end - time.monotonic()))
        recorded = self._random.choice(self._engine.responses)
        self._versions.count(len(recorded.token_ids))
        self._simulated_s += duration
        return SampleResponse(recorded.token_ids, recorded.log_probs, recorded.text, version)

    async def load(self, version: int, path: Path) -> None:
        """Takes the simulated time to load an adapter."""
        await self._versions.load(version, path)
        self._newest_since[version] = time.time()
        for old in sorted(self._newest_since)[:-REMEMBERED_LOADS]:
            del self._newest_since[old]

    async def retire(self) -> None:
        """Drops adapters that are not the newest and that no request in flight names."""
        await self._versions.retire()

    async def sleep(self, level: int) -> None:
        """Returns: there is no memory to give up."""

    async def wake_up(self) -> None:
        """Returns: there is no memory to take back."""

    async def check_health(self) -> None:
        """Returns: nothing can fail."""

    def stats(self) -> dict[str, Any]:
        """Returns `AdapterVersions.stats`, ``engine_pids`` (none), ``simulated_s`` (time of all finished responses,
        seconds) and ``newest_since`` (when each of the last versions was loaded, seconds since the epoch)."""
        own = {"engine_pids": [], "simulated_s": self._simulated_s, "newest_since": dict(self._newest_since)}
        return {**self._versions.stats(), **own}

    def shutdown(self) -> None:
        """Ends nothing: there is no engine."""

    async def _load(self, version: int, path: Path) -> None:
        await asyncio.sleep(self._engine.load_s)

    async def _forget(self, version: int) -> None:
        return None
