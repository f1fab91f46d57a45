"""What a policy sampler takes and gives back, whichever engine stands behind it."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import BASE_VERSION


@dataclass(frozen=True)
class SampleRequest:
    """One response asked of the policy.

    Attributes:
        prompt: The task's prompt, before any chat template.
        image: The current picture, encoded (PNG).
        max_tokens: Longest response, tokens.
        temperature: Sampling temperature; 0 is greedy.
        version: Policy version that must answer, 0 being the base model; None for the newest when the
            request is admitted.
        seed: Makes this response's sampling repeatable for the same engine; None draws freely.
    """

    prompt: str
    image: bytes
    max_tokens: int
    temperature: float
    version: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class SampleResponse:
    """One response of the policy.

    Attributes:
        token_ids: The tokens exactly as sampled, the end token last when it was sampled.
        log_probs: Log-probability of each token (nats) under the raw model: temperature 1, nothing masked.
        text: Their text as `PolicyInputs.decode` gives it.
        version: Policy version that answered: one version for the whole response.
        cut: Whether a limit ended it, of the response's tokens or of what the prompt leaves of the model's length,
            instead of the policy.
    """

    token_ids: list[int]
    log_probs: list[float]
    text: str
    version: int
    cut: bool = False


class PolicySampler(Protocol):
    """An engine that samples responses of a policy, many at once, under several adapter versions."""

    @property
    def newest(self) -> int:
        """The version that answers requests which name none."""

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response; the version is fixed when the request is admitted.

        Raises:
            UnknownVersionError: The request names a version whose adapter does not exist, or is removed.
            SamplerUnavailableError: The engine failed; the request can be tried again elsewhere.
            PromptTooLongError: The prompt leaves no room for a response.
            UserError: The request can never be answered.
        """

    async def load(self, version: int, path: Path) -> None:
        """Makes the adapter in `path` (PEFT format) known; it becomes the newest if its id is the largest.

        Raises:
            UserError: The folder holds no adapter that this engine can apply in full.
            UnknownVersionError: The folder was removed.
        """

    async def retire(self) -> None:
        """Drops adapters that are not the newest and that no request in flight names."""

    async def sleep(self, level: int) -> None:
        """Gives up the device's memory; called when no request is in flight, and none comes until `wake_up`.

        Args:
            level: 1 keeps the weights in main memory, 2 drops them.
        """

    async def wake_up(self) -> None:
        """Takes the memory back; answers afterwards as before, the newest adapter's version included.

        Raises:
            UserError: It does not answer as before.
            SamplerUnavailableError: The engine failed.
        """

    async def check_health(self) -> None:
        """Returns when the engine can answer, raises when it cannot (any more)."""

    def stats(self) -> dict[str, Any]:
        """Returns `AdapterVersions.stats` and the engine's process ids, ``engine_pids``."""

    def shutdown(self) -> None:
        """Ends the engine and its processes."""


def new_engine_seed() -> int:
    """Returns the seed of an engine's free draws: another one for every engine, and for every start of one.

    With a seed in common all replicas would draw the same for their nth request, and again after a restart. A request
    that is to be repeatable carries a seed of its own.
    """
    return secrets.randbits(31)


class UnknownVersionError(LookupError):
    """A request names a policy version whose adapter does not exist, or not any more; the newest always does."""


class PromptTooLongError(UserError):
    """A prompt leaves no room for a response in ``sampler.max_model_len``."""

    @classmethod
    def of(cls, tokens: int | None, longest: int) -> "PromptTooLongError":
        """Returns the error of a prompt of so many tokens, None for at least `longest`."""
        found = f"{longest} tokens or more" if tokens is None else f"{tokens} tokens"
        return cls(f"a prompt of {found} leaves no room in sampler.max_model_len = {longest}; raise it")


class SamplerUnavailableError(RuntimeError):
    """The engine failed while it had the request, or is gone; another try may succeed."""


class SamplerAsleepError(SamplerUnavailableError):
    """The sampler sleeps while the learner steps; it will be woken up."""


class AdapterVersions:
    """Which adapter versions an engine holds, and how many requests in flight name each.

    For use on one event loop. An adapter leaves the engine only when no request names it, never by age;
    where all are in use, a further one waits for its place.
    """

    def __init__(
        self,
        add: Callable[[int, Path], Awaitable[None]],
        remove: Callable[[int], Awaitable[None]],
        path_of: Callable[[int], Awaitable[Path]] | None = None,
        capacity: int = 4,
    ) -> None:
        """Starts with the base model only.

        Args:
            add: Loads an adapter into the engine.
            remove: Drops an adapter from the engine.
            path_of: Finds the adapter of a version that a request names and the engine does not hold;
                raises `UnknownVersionError`. None: such a request is refused.
            capacity: Adapters that the engine may hold at once; at least 2.
        """
        self._capacity = capacity
        self._add = add
        self._remove = remove
        self._path_of = path_of
        self._newest = BASE_VERSION
        self._paths: dict[int, Path] = {}
        self._in_flight: Counter[int] = Counter()
        self._changes = asyncio.Lock()
        self._freed = asyncio.Event()
        self._tokens = 0
        self._responses = 0
        self._started = time.monotonic()
        self._busy_s = 0.0
        self._busy_since: float | None = None

    @property
    def newest(self) -> int:
        """The version that answers requests which name none."""
        return self._newest

    def path(self, version: int) -> Path:
        """Returns the folder of a version that the engine holds."""
        return self._paths[version]

    async def load(self, version: int, path: Path) -> None:
        """Loads an adapter; it becomes the newest if its version is the largest so far."""
        if version <= BASE_VERSION:
            raise ValueError(f"adapter versions count from {BASE_VERSION + 1}, got {version}")
        await self._hold(version, path)
        self._newest = max(self._newest, version)
        self._freed.set()

    @asynccontextmanager
    async def admit(self, version: int | None) -> AsyncIterator[int]:
        """Fixes a request's version and keeps its adapter loaded until the block ends.

        Raises:
            UnknownVersionError: No such version.
        """
        chosen = self._newest if version is None else version
        # Counted before the first await, so that `retire` never sees the request's adapter as unused.
        self._enter(chosen)
        try:
            if chosen != BASE_VERSION and chosen not in self._paths:
                if self._path_of is None:
                    raise UnknownVersionError(f"policy version {chosen} is not loaded")
                await self._hold(chosen, await self._path_of(chosen))
            yield chosen
        finally:
            self._leave(chosen)

    async def retire(self) -> None:
        """Drops adapters that are not the newest and that no request in flight names."""
        async with self._changes:
            for version in self._unused():
                await self._drop(version)

    async def renew(self) -> None:
        """Takes every adapter out of the engine, and gives it the newest again from disk.

        For an engine whose memory was given up in between: what it holds of an adapter may be gone or stale. No
        request may be in flight; one that names another version later loads that again.
        """
        async with self._changes:
            for version in sorted(self._paths):
                await self._remove(version)
                if version == self._newest:
                    await self._add_published(version, self._paths[version])
                else:
                    del self._paths[version]

    def count(self, tokens: int) -> None:
        """Notes a finished response of so many tokens."""
        self._tokens += tokens
        self._responses += 1

    def stats(self) -> dict[str, Any]:
        """Returns newest and loaded versions, requests in flight, and since the start: responses, their
        tokens, seconds up, and seconds with a request in flight (``busy_s``)."""
        now = time.monotonic()
        return {
            "newest_version": self._newest,
            "loaded_versions": sorted(self._paths),
            "in_flight": self._in_flight.total(),
            "responses": self._responses,
            "tokens": self._tokens,
            "up_s": now - self._started,
            "busy_s": self._busy_s + (0.0 if self._busy_since is None else now - self._busy_since),
        }

    async def _hold(self, version: int, path: Path) -> None:
        while True:
            async with self._changes:
                if version in self._paths:
                    return
                if len(self._paths) >= self._capacity:
                    for unused in self._unused()[:1]:
                        await self._drop(unused)
                if len(self._paths) < self._capacity:
                    await self._add_published(version, path)
                    self._paths[version] = path
                    return
                self._freed.clear()
            # Not under the lock: the versions in use must go on being found, and new ones retired.
            await self._freed.wait()

    async def _add_published(self, version: int, path: Path) -> None:
        try:
            await self._add(version, path)
        except UserError:
            if not path.is_dir():
                raise UnknownVersionError(
                    f"{path}: adapter version {version} was removed while it was loaded"
                ) from None
            raise

    def _unused(self) -> list[int]:
        return [v for v in sorted(self._paths) if v != self._newest and self._in_flight[v] == 0]

    async def _drop(self, version: int) -> None:
        if self._in_flight[version] == 0:
            # Forgotten before the engine drops it: a request from now on loads it again.
            del self._paths[version]
            await self._remove(version)

    def _enter(self, version: int) -> None:
        if self._busy_since is None:
            self._busy_since = time.monotonic()
        self._in_flight[version] += 1

    def _leave(self, version: int) -> None:
        self._in_flight[version] -= 1
        if self._in_flight[version] == 0:
            del self._in_flight[version]
            self._freed.set()
        if self._in_flight.total() == 0 and self._busy_since is not None:
            self._busy_s += time.monotonic() - self._busy_since
            self._busy_since = None
