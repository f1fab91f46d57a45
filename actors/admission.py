"""How far generation may run ahead of learning, and what a learner step waits for: one rule for both."""

from dataclasses import dataclass

from gflowvlm.shared.config import RunConfig


@dataclass(frozen=True)
class Pacing:
    """The rule that rollouts and learner keep in step by; it counts nothing.

    A learner step uses up `fresh_per_step` new trajectories, and a version is published every `publish_every` steps,
    so a version's batch is ``publish_every · fresh_per_step``. At version v the learner can have used at most
    ``(v + 1) · batch``, so with at most ``(max_staleness + v + 1) · batch`` ever started, none is more than
    `max_staleness` versions old when its turn comes (AReaL's rule). What a step waits for is always among what may have
    been started.

    Attributes:
        max_staleness: Versions that generation may run ahead.
        fresh_per_step: New trajectories that a learner step uses up.
        publish_every: Learner steps per version.
        group_size: Trajectories of one group (K); groups start whole.
    """

    max_staleness: int
    fresh_per_step: int
    publish_every: int
    group_size: int

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"pacing: max_staleness must not be negative, found {self.max_staleness}")
        for name in ("fresh_per_step", "publish_every", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"pacing: {name} must be at least 1, found {getattr(self, name)}")

    @classmethod
    def of(cls, config: RunConfig) -> "Pacing":
        """Returns the rule of a run."""
        return cls(
            max_staleness=config.replay.max_staleness,
            fresh_per_step=config.fresh_per_step,
            publish_every=config.learner.publish_every,
            group_size=config.rollout.group_size,
        )

    def accepted_before(self, step: int) -> int:
        """Returns how many trajectories must have been accepted before a learner step is taken; the first is 0."""
        return (step + 1) * self.fresh_per_step

    def most_started(self, learned: int) -> int:
        """Returns how many trajectories may ever have been started once so many learner steps are done."""
        versions = learned // self.publish_every
        return (self.max_staleness + versions + 1) * self.publish_every * self.fresh_per_step


@dataclass
class Admission:
    """The counts of a run that its pacing is applied to; the driver has the only ones.

    Attributes:
        pacing: The rule.
        learned: Most learner steps ever done: a learner that goes back to its checkpoint takes no room away.
        accepted: Trajectories that the replay buffer has accepted, as it said last. It alone counts them: it knows of
            a group whose worker died before telling of it.
        running: Trajectories that were started and neither acknowledged nor failed. What failed does not count,
            since nobody will learn from it.
    """

    pacing: Pacing
    learned: int = 0
    accepted: int = 0
    running: int = 0

    def __post_init__(self) -> None:
        for name in ("learned", "accepted", "running"):
            if getattr(self, name) < 0:
                raise ValueError(f"admission: {name} must not be negative, found {getattr(self, name)}")

    @property
    def capacity(self) -> int:
        """Trajectories that may still be started; negative after an overshoot of less than a group."""
        return self.pacing.most_started(self.learned) - (self.accepted + self.running)

    @property
    def admissible_groups(self) -> int:
        """Groups that may be started now.

        Rounded up: where a version's trajectories are no multiple of a group, rounding down could leave the learner
        waiting for the last few for ever.
        """
        return max(0, -(-self.capacity // self.pacing.group_size))

    @property
    def groups_running(self) -> int:
        """Groups that were started and neither acknowledged nor failed."""
        return self.running // self.pacing.group_size

    def admit(self, groups: int) -> int:
        """Starts up to `groups` groups; returns how many were admitted and now count as running."""
        admitted = min(groups, self.admissible_groups)
        self.running += admitted * self.pacing.group_size
        return admitted

    def note_accepted(self, groups: int, accepted: int) -> None:
        """Running groups were acknowledged by the replay buffer, which has accepted so many trajectories in all.

        Answers may overtake each other. Until a group's own comes, it may count as accepted and as running: too much
        for a moment, never too little.
        """
        self._finish(groups)
        self.accepted = max(self.accepted, accepted)

    def note_failed(self, groups: int = 1) -> None:
        """Running groups were lost; their share is free again."""
        self._finish(groups)

    def note_learned(self, step: int) -> None:
        """A learner step was done; one that was done before changes nothing."""
        self.learned = max(self.learned, step)

    def _finish(self, groups: int) -> None:
        finished = groups * self.pacing.group_size
        if finished > self.running:
            raise ValueError(f"admission: {finished} trajectories finished, but {self.running} were running")
        self.running -= finished
