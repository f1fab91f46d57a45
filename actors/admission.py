"""Admission of new rollouts: how far generation may run ahead of learning."""

from dataclasses import dataclass


@dataclass
class Admission:
    """Counts trajectories so that generation stays at most `max_staleness` versions ahead.

    At version v the learner can have used at most ``(v + 1) · batch`` new trajectories, so with at most
    ``(max_staleness + v + 1) · batch`` ever started, none is more than `max_staleness` versions old when its
    turn comes (AReaL's rule). What failed does not count, since nobody will learn from it.

    Attributes:
        max_staleness: Versions that generation may run ahead.
        batch: New trajectories that the learner uses up per version.
        group_size: Trajectories of one group (K); groups start whole.
        version: Newest published version, counted on over a resume.
        accepted: Trajectories that the replay buffer has acknowledged, counted on over a resume.
        running: Trajectories that were started and neither acknowledged nor failed.
    """

    max_staleness: int
    batch: int
    group_size: int
    version: int = 0
    accepted: int = 0
    running: int = 0

    def __post_init__(self) -> None:
        for name in ("max_staleness", "version", "accepted", "running"):
            if getattr(self, name) < 0:
                raise ValueError(f"admission: {name} must not be negative, found {getattr(self, name)}")
        for name in ("batch", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"admission: {name} must be at least 1, found {getattr(self, name)}")

    @property
    def capacity(self) -> int:
        """Trajectories that may still be started; negative after an overshoot of less than a group."""
        return (self.max_staleness + self.version + 1) * self.batch - (self.accepted + self.running)

    @property
    def admissible_groups(self) -> int:
        """Groups that may be started now.

        Rounded up: with `batch` no multiple of `group_size`, rounding down could leave the learner waiting for
        the last few trajectories for ever.
        """
        return max(0, -(-self.capacity // self.group_size))

    def admit(self, groups: int) -> int:
        """Starts up to `groups` groups; returns how many were admitted and now count as running."""
        admitted = min(groups, self.admissible_groups)
        self.running += admitted * self.group_size
        return admitted

    def note_accepted(self, groups: int = 1) -> None:
        """Running groups were acknowledged by the replay buffer."""
        self._finish(groups)
        self.accepted += groups * self.group_size

    def note_failed(self, groups: int = 1) -> None:
        """Running groups were lost; their share is free again."""
        self._finish(groups)

    def advance(self, version: int) -> None:
        """A newer version was published."""
        if version < self.version:
            raise ValueError(f"admission: version went back from {self.version} to {version}")
        self.version = version

    def _finish(self, groups: int) -> None:
        finished = groups * self.group_size
        if finished > self.running:
            raise ValueError(f"admission: {finished} trajectories finished, but {self.running} were running")
        self.running -= finished
