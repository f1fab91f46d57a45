"""When a run should have more or fewer rollout workers and policy server replicas. Decides; changes nothing."""

from dataclasses import dataclass, replace

from gflowvlm.shared.cluster_settings import ScalingSettings

FULL = 0.9
"""Share of the capacity in use from which on a part counts as full."""

FITS = 0.8
"""Share of the capacity that may be in use once some have gone. Less than `FULL`, so that nothing swings."""


WORKERS_KEY, REPLICAS_KEY = "rollout.workers", "sampler.replicas"
"""What the two numbers are called, in a configuration and everywhere else."""


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        workers: Rollout workers, ``rollout.workers``.
        replicas: Policy server replicas, ``sampler.replicas``.
    """

    workers: int
    replicas: int

    def __str__(self) -> str:
        return f"{WORKERS_KEY}={self.workers} {REPLICAS_KEY}={self.replicas}"


@dataclass(frozen=True)
class Load:
    """What a run's parts are doing.

    Attributes:
        learner_waiting: Share of the newest learner steps' time spent waiting for a batch.
        sampler_idle: Share of the last seconds without a request in flight, mean over replicas.
        requests: Requests at the replicas, waiting ones included.
        requests_capacity: Requests that the replicas in service decode at once.
        groups: Training groups being played.
        groups_capacity: Training groups that the workers in service may play at once.
        serving: Workers and replicas in service; fewer than the run is set to while some start or find no room.
    """

    learner_waiting: float
    sampler_idle: float
    requests: int
    requests_capacity: int
    groups: int
    groups_capacity: int
    serving: Size


@dataclass(frozen=True)
class Change:
    """A decision.

    Attributes:
        size: The size to change to.
        reason: What was seen.
    """

    size: Size
    reason: str


class AutoScaling:
    """Decides by load, within the bounds of the settings.

    The learner waits: more of what is full, replicas before workers, since more workers only lengthen the queue of
    full replicas. Workers that are not full are held back by the capacity rule, and more would not help. The learner
    does not wait: fewer of what the rest can do without, replicas by how busy they are, workers by the groups that
    the capacity rule lets them play. In between nothing changes. Growth is by half, shrinking by a quarter, one part
    at a time.

    A wish must repeat itself (``scaling.patience``), and a change, whoever made it, must have had time to show
    (``scaling.cooldown_s``). What has not arrived yet is not asked for again.

    Args:
        settings: Bounds, thresholds, patience.
    """

    def __init__(self, settings: ScalingSettings) -> None:
        self._settings = settings
        self._quiet_until = 0.0
        self._wished = (0, 0)
        self._repeated = 0

    def note_change(self, now: float) -> None:
        """The size was changed at `now`, seconds of a monotonic clock."""
        self._quiet_until = now + self._settings.cooldown_s
        self._wished, self._repeated = (0, 0), 0

    def decide(self, load: Load, size: Size, now: float) -> Change | None:
        """Returns the change that is due, or None; call `note_change` once it is made.

        Args:
            load: What was seen since the last call.
            size: What the run is set to.
            now: Seconds of a monotonic clock.
        """
        if now < self._quiet_until:
            return None
        wish = self._wanted_size(load, size)
        direction = (_sign(wish.workers, size.workers), _sign(wish.replicas, size.replicas))
        self._repeated = self._repeated + 1 if direction == self._wished else 1
        self._wished = direction
        if wish == size or self._repeated < self._settings.patience:
            return None
        return Change(wish, _described(load))

    def _wanted_size(self, load: Load, size: Size) -> Size:
        if load.learner_waiting >= self._settings.more_above:
            return self._more(load, size)
        if load.learner_waiting <= self._settings.fewer_below:
            return self._fewer(load, size)
        return size

    def _more(self, load: Load, size: Size) -> Size:
        most_workers, most_replicas = self._settings.max_workers, self._settings.max_replicas
        replicas_full = load.requests >= FULL * load.requests_capacity
        workers_full = load.groups >= FULL * load.groups_capacity
        # A small batch may keep an engine busy too: once no more workers are allowed, replicas are what is left.
        busy = workers_full and size.workers >= most_workers and load.sampler_idle <= 1 - FULL
        if replicas_full or busy:
            arrived = load.serving.replicas >= size.replicas
            return replace(size, replicas=_grown(size.replicas, most_replicas)) if arrived else size
        if workers_full and load.serving.workers >= size.workers:
            return replace(size, workers=_grown(size.workers, most_workers))
        return size

    def _fewer(self, load: Load, size: Size) -> Size:
        replicas = _shrunk(size.replicas, self._settings.min_replicas)
        fits = FITS * min(1.0, replicas / max(1, load.serving.replicas))
        if (
            replicas < size.replicas
            and 1 - load.sampler_idle <= fits
            and load.requests <= fits * load.requests_capacity
        ):
            return replace(size, replicas=replicas)
        workers = _shrunk(size.workers, self._settings.min_workers)
        fits = FITS * min(1.0, workers / max(1, load.serving.workers))
        if load.groups <= fits * load.groups_capacity:
            return replace(size, workers=workers)
        return size


def _grown(number: int, most: int) -> int:
    return min(most, number + max(1, number // 2))


def _shrunk(number: int, least: int) -> int:
    return max(least, number - max(1, number // 4))


def _sign(wished: int, present: int) -> int:
    return (wished > present) - (wished < present)


def _described(load: Load) -> str:
    return (
        f"the learner waits {load.learner_waiting:.0%} of its time, {load.groups} of {load.groups_capacity} groups "
        f"play, {load.requests} requests for {load.requests_capacity} places, samplers idle {load.sampler_idle:.0%}"
    )
