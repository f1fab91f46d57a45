"""When a group that failed is played again, when it is set aside, and when the run must end. Decides; plays nothing."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from gflowvlm.actors.groups import FailureCause, GroupRequest
from gflowvlm.shared.errors import UserError

MAX_OF_INSTANCE = 3
"""Failures of a group by its own environment after which it is set aside: what an environment does with a seed it does
again, and a third try tells a chance (a process that ran out of memory) from a broken instance."""

MAX_OF_CAUSE = 10
"""Failures of a group by a cause that others share (the policy server, the replay buffer, a lost worker) after which it
is set aside, or ends the run where nothing has finished since its first. Each of them has waited for long already."""

MAX_SET_ASIDE_IN_A_ROW = 10
"""Groups set aside without any that finishes between them after which the run ends; more where more play at a time."""


@dataclass
class _Failed:
    """A group's failures since it was first handed out."""

    since: int
    counts: Counter[FailureCause] = field(default_factory=Counter)


class GroupFailures:
    """Counts failures per group and cause.

    Many groups that fail at one moment, because a node with all of their workers is gone or the policy server is away,
    have failed once each: that is one cause, however many they are. A run ends when nothing finishes any more, and only
    then.

    Attributes:
        set_aside: Groups that are not played any more.
    """

    def __init__(self) -> None:
        self._groups: dict[Hashable, _Failed] = {}
        self._broken: set[tuple[str, int]] = set()
        self._finished = 0
        self._in_a_row = 0
        self.set_aside = 0

    def note_finished(self, group: Hashable) -> None:
        """A group has been played."""
        self._groups.pop(group, None)
        self._finished += 1
        self._in_a_row = 0

    def is_broken(self, request: GroupRequest) -> bool:
        """Whether a group's instance has been set aside for what its own environment does."""
        return (request.split, request.instance_seed) in self._broken

    def note_failed(
        self, group: Hashable, request: GroupRequest, cause: FailureCause, reason: str, at_a_time: int
    ) -> bool:
        """A group has failed.

        Args:
            group: What tells it from all others.
            request: What was asked for.
            cause: Why.
            reason: The same in words, for the error.
            at_a_time: Groups that may be played at the same time.

        Returns:
            Whether it is set aside; else it is to be played again.

        Raises:
            UserError: Nothing finishes any more.
        """
        failed = self._groups.setdefault(group, _Failed(self._finished))
        failed.counts[cause] += 1
        tries = failed.counts[cause]
        own = cause is FailureCause.ENVIRONMENT
        if tries < (MAX_OF_INSTANCE if own else MAX_OF_CAUSE) and not (own and self.is_broken(request)):
            return False
        if not own and failed.since == self._finished:
            raise UserError(
                f"rollouts failed {tries} times in a row, last: {reason}; look at the policy server's and workers' "
                "logs in the Ray dashboard"
            )
        del self._groups[group]
        if own:
            self._broken.add((request.split, request.instance_seed))
        self.set_aside += 1
        self._in_a_row += 1
        if self._in_a_row >= max(MAX_SET_ASIDE_IN_A_ROW, 2 * at_a_time):
            raise UserError(
                f"{self._in_a_row} groups in a row were set aside and none has finished, last: {reason}; look at the "
                "environment's data, and at the workers' logs in the Ray dashboard"
            )
        return True

    def tries(self, group: Hashable) -> int:
        """Returns how often a group that is still to be played has failed."""
        failed = self._groups.get(group)
        return 0 if failed is None else failed.counts.total()
