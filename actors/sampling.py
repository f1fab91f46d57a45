"""What a policy sampler takes and gives back, whichever engine stands behind it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

BASE_VERSION = 0
"""The policy version that is the base model without an adapter."""


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
    """

    token_ids: list[int]
    log_probs: list[float]
    text: str
    version: int


class PolicySampler(Protocol):
    """An engine that samples responses of a policy, many at once, under several adapter versions."""

    @property
    def newest(self) -> int:
        """The version that answers requests which name none."""

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """Samples one response; the version is fixed when the request is admitted.

        Raises:
            UnknownVersionError: The request names a version whose adapter does not exist.
        """

    async def load(self, version: int, path: Path) -> None:
        """Makes the adapter in `path` (PEFT format) known; it becomes the newest if its id is the largest.

        Raises:
            UserError: The folder holds no adapter that this engine can apply in full.
        """

    async def retire(self) -> None:
        """Drops adapters that are not the newest and that no request in flight names."""

    async def check_health(self) -> None:
        """Returns when the engine can answer, raises when it cannot (any more)."""

    def stats(self) -> dict[str, Any]:
        """Returns ``newest_version``, ``in_flight``, ``loaded_versions``, ``tokens`` and ``responses`` since
        the start, ``busy_s`` (seconds with a request in flight), ``up_s``, and the engine's ``pids``."""

    def shutdown(self) -> None:
        """Ends the engine and its processes."""


class UnknownVersionError(LookupError):
    """A request names a policy version whose adapter does not exist."""
