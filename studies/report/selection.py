"""Which of a run's trajectories the page shows: whole groups, spread evenly over the run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import Trajectory, read_trajectories


@dataclass(frozen=True)
class Selection:
    """The trajectories that are shown.

    Attributes:
        trajectories: In the order in which they were written.
        total: How many the run holds.
        groups: Groups shown.
        total_groups: Groups that the run holds.
        instance: The instance that was asked for, None when none was.
    """

    trajectories: list[Trajectory]
    total: int
    groups: int
    total_groups: int
    instance: str | None

    @property
    def rule(self) -> str:
        """How the trajectories were chosen, in words for the reader."""
        if len(self.trajectories) == self.total:
            return f"All {self.total} trajectories of the run are shown."
        asked = "" if self.instance is None else f", after those of {self.instance}"
        return (
            f"{len(self.trajectories)} of the run's {self.total} trajectories are shown: {self.groups} of "
            f"{self.total_groups} groups, at even distances from the first to the last in the order in which they "
            f"were written{asked}. Groups are shown whole, save one that is larger than the limit by itself, of which "
            "the first trajectories are shown. A larger --limit shows more."
        )


@dataclass(frozen=True)
class _Group:
    """Where one group stands."""

    path: Path
    group_id: str
    instance_id: str
    size: int


def select_trajectories(folder: Path, limit: int, instance: str | None = None) -> Selection:
    """Returns at most `limit` trajectories of a run; of the files, only those with a chosen group are read whole.

    Args:
        folder: The run's folder of trajectories; one that does not exist holds none.
        limit: The most trajectories to take.
        instance: Instance id whose groups are taken before all others.

    Raises:
        UserError: A file is damaged, or nothing of the instance was played.
    """
    groups = [group for path in (trajectory_files(folder) if folder.is_dir() else []) for group in _groups(path)]
    asked = [group for group in groups if group.instance_id == instance]
    if instance is not None and len(asked) == 0:
        raise UserError(f"--instance {instance}: nothing of it was played; `gflowvlm replay RUN` shows what was")
    chosen = _spread(asked, limit)
    others = [group for group in groups if group.instance_id != instance]
    room = limit - sum(group.size for group in chosen)
    if room > 0:
        chosen += _spread(others, room)
    trajectories: list[Trajectory] = []
    wanted = Counter({(group.path, group.group_id): group.size for group in chosen})
    files = {group.path for group in chosen}
    for path in dict.fromkeys(group.path for group in groups if group.path in files):
        for trajectory in read_trajectories(path):
            if wanted[path, trajectory.group_id] > 0:
                wanted[path, trajectory.group_id] -= 1
                trajectories.append(trajectory)
    total = sum(group.size for group in groups)
    return Selection(trajectories, total, len(chosen), len(groups), instance)


def _groups(path: Path) -> list[_Group]:
    """Returns the groups of one file; its pictures and responses are not read."""
    try:
        table = pq.read_table(path, columns=["group_id", "instance_id"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable trajectory file ({error}); remove or restore it") from None
    sizes = Counter(zip(table["group_id"].to_pylist(), table["instance_id"].to_pylist(), strict=True))
    return [_Group(path, group_id, instance_id, size) for (group_id, instance_id), size in sizes.items()]


def _spread(groups: Sequence[_Group], limit: int) -> list[_Group]:
    """Returns as many evenly spaced groups as fit; a single one that does not fit is cut."""
    if len(groups) == 0:
        return []
    total = sum(group.size for group in groups)
    count = min(len(groups), max(1, limit * len(groups) // total))
    while True:
        # The last is always among them: it shows what the policy has become.
        chosen = [groups[len(groups) - 1 - at * (len(groups) - 1) // max(1, count - 1)] for at in range(count)]
        if sum(group.size for group in chosen) <= limit:
            return chosen
        if count == 1:
            return [_Group(chosen[0].path, chosen[0].group_id, chosen[0].instance_id, limit)]
        count -= 1
