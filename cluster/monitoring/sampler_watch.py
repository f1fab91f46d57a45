"""How busy the policy server's replicas are, seen from the driver."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STATUS_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class SamplerLoad:
    """What the replicas are doing.

    Attributes:
        replicas: Replicas that answered.
        requests: Requests that they have, waiting ones included.
        idle_share: Share of the time since the look before in which a replica had none, mean over the replicas
            that answered both times; None when there is none.
    """

    replicas: int
    requests: int
    idle_share: float | None


class SamplerWatch:
    """Looks at the replicas now and then.

    Args:
        statuses: Returns what the replicas say of themselves (`PolicyClient.status`); may raise TimeoutError.
    """

    def __init__(self, statuses: Callable[[], list[dict[str, Any]]]) -> None:
        self._statuses = statuses
        self._before: dict[str, tuple[float, float]] = {}

    def look(self) -> SamplerLoad | None:
        """Returns the load now, or None when no replica answers."""
        try:
            replicas = self._statuses()
        except TimeoutError:
            return None
        seen = {r["replica"]: (float(r["busy_s"]), float(r["up_s"])) for r in replicas}
        shares = []
        for replica, (busy, up) in seen.items():
            busy_before, up_before = self._before.get(replica, (0.0, 0.0))
            if replica in self._before and up > up_before:
                shares.append(1.0 - (busy - busy_before) / (up - up_before))
        self._before = seen
        if not replicas:
            return None
        return SamplerLoad(
            replicas=len(replicas),
            requests=sum(int(r["in_flight"]) for r in replicas),
            idle_share=sum(shares) / len(shares) if shares else None,
        )
