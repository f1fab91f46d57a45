"""Which of a run's trajectories are wanted, and what they are: Arrow data, a table, or `Trajectory` objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.envs.base import SPLITS
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.task_settings import task_names
from gflowvlm.shared.trajectory import (
    SCHEMA_VERSION,
    TRAJECTORY_SCHEMA,
    EndReason,
    Trajectory,
    Validity,
    from_arrow,
    is_trajectory_schema,
)

if TYPE_CHECKING:
    import pandas as pd

_SUMMARY_COLUMNS = (
    "trajectory_id",
    "group_id",
    "instance_id",
    "split",
    "success",
    "outcome",
    "end",
    "expert",
    "log_reward",
    "steps",
    "version",
    "actions",
)


@dataclass(frozen=True)
class Filters:
    """Which trajectories are wanted; None leaves a property open.

    Attributes:
        success: Whether they solved the task.
        expert: Whether the expert made them.
        task: Name of the task.
        split: ``id`` or ``ood``.
        version: A policy version that answered at least one of their steps.
        min_version: The oldest policy version that may have answered a step.
        group: Group id, or group index as digits.
        instance: Seed of the task instance.
        end: Why they ended (a value of `EndReason`).
        validity: What became of at least one of their responses (a value of `Validity`).
    """

    success: bool | None = None
    expert: bool | None = None
    task: str | None = None
    split: str | None = None
    version: int | None = None
    min_version: int | None = None
    group: str | None = None
    instance: int | None = None
    end: str | None = None
    validity: str | None = None

    def check(self) -> None:
        """Raises UserError for a task, split, end or validity that does not exist."""
        choices: dict[str, Sequence[str]] = {
            "task": task_names(),
            "split": SPLITS,
            "end": [end.value for end in EndReason],
            "validity": [validity.value for validity in Validity],
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{name} {value!r}: there is no such {name}; use one of: {', '.join(known)}")

    @property
    def by_step(self) -> bool:
        """Whether steps have to be looked at, which Parquet cannot filter by."""
        return any(value is not None for value in (self.version, self.min_version, self.validity))

    def expression(self) -> ds.Expression | None:
        """Returns the part that Parquet can filter by itself."""
        wanted = {
            "success": self.success,
            "expert": self.expert,
            "task": self.task,
            "split": self.split,
            "instance_seed": self.instance,
            "end": self.end,
        }
        terms = [ds.field(name) == value for name, value in wanted.items() if value is not None]
        if self.group is not None:
            by_index = self.group.isdecimal()
            name = ds.field("group_id")
            terms.append(pc.starts_with(name, pattern=f"g{int(self.group):08d}-") if by_index else name == self.group)
        if len(terms) == 0:
            return None
        whole = terms[0]
        for term in terms[1:]:
            whole = whole & term
        return whole

    def passes(self, steps: pa.StructArray) -> bool:
        """Whether the steps of one trajectory fit the versions and the validity asked for."""
        versions = steps.field("policy_version").to_pylist()
        return (
            (self.version is None or self.version in versions)
            and (self.min_version is None or min(versions, default=-1) >= self.min_version)
            and (self.validity is None or self.validity in steps.field("validity").to_pylist())
        )

    def describe(self) -> str:
        """Returns what is asked for as keyword arguments."""
        asked = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name}={value!r}" for name, value in asked if value is not None)


class Trajectories:
    """Trajectories of a run, or of a set of demonstrations, as far as they were written when this was made.

    Iterating gives `gflowvlm.Trajectory` objects, the oldest first; nothing is read before it is asked for.

    Example:
        >>> solved = gflowvlm.Run(path).trajectories(success=True)
        >>> len(solved) > 0
        True
        >>> solved.newest(1)[0].success
        True
        >>> solved.to_table(["instance_id", "log_rewards"]).column_names
        ['instance_id', 'log_rewards']
    """

    def __init__(self, folder: Path, filters: Filters) -> None:
        """Opens the files.

        Args:
            folder: Folder of a run or of demonstrations.
            filters: Which are wanted.

        Raises:
            UserError: There are no trajectories, a file is damaged (the message names it), or a filter's value
                does not exist.
        """
        filters.check()
        self._folder, self._filters = folder, filters
        self._dataset = _open(folder)

    def dataset(self) -> ds.Dataset:
        """Returns them as an Arrow dataset of `gflowvlm.shared.trajectory.TRAJECTORY_SCHEMA`, one row each.

        Its filter is carried out when it is read. Filters by version or validity look at the steps first.
        """
        if self._filters.by_step:
            return self._dataset.filter(_one_of(self._ids()))
        expression = self._filters.expression()
        return self._dataset if expression is None else self._dataset.filter(expression)

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns them as an Arrow table.

        Args:
            columns: The columns wanted; all by default. Without ``images`` it is much smaller.

        Raises:
            UserError: A file is damaged, or there is no such column.
        """
        for name in columns or ():
            if name not in TRAJECTORY_SCHEMA.names:
                names = ", ".join(TRAJECTORY_SCHEMA.names)
                raise UserError(f"column {name!r}: a trajectory has no such column; there are: {names}")
        with self._read_errors():
            return self.dataset().to_table(columns=None if columns is None else list(columns))

    def to_pandas(self) -> pd.DataFrame:
        """Returns a table with one row a trajectory, without texts and pictures.

        Its ``log_reward`` is that of the last state (nats, before the exponent β), ``steps`` the number of
        responses, ``version`` the newest policy version that answered (-1 for the expert), ``actions`` the
        parsed actions as a tuple, None where a response was malformed.
        """
        import pandas as pd

        with self._read_errors():
            names = [name for name in TRAJECTORY_SCHEMA.names if name != "images"]
            rows = [_summary(row) for row in self.to_table(names).to_pylist()]
        return pd.DataFrame(rows, columns=list(_SUMMARY_COLUMNS))

    def newest(self, count: int) -> list[Trajectory]:
        """Returns the newest `count` of them, the oldest of these first.

        Raises:
            UserError: A file is damaged.
        """
        with self._read_errors():
            ids = self._ids()[-count:]
            return from_arrow(self._dataset.to_table(filter=_one_of(ids)))[-count:]

    def __iter__(self) -> Iterator[Trajectory]:
        with self._read_errors():
            batches = self.dataset().to_batches()
        while True:
            with self._read_errors():
                batch = next(batches, None)
                found = [] if batch is None else from_arrow(batch)
            if batch is None:
                return
            yield from found

    def __len__(self) -> int:
        with self._read_errors():
            return len(self._ids()) if self._filters.by_step else int(self.dataset().count_rows())

    def __repr__(self) -> str:
        asked = self._filters.describe()
        return f"<{len(self)} trajectories of {str(self._folder)!r}{', ' if asked else ''}{asked}>"

    def _ids(self) -> list[str]:
        """Returns the ids of those that pass, the oldest first."""
        columns = ["trajectory_id", "steps"] if self._filters.by_step else ["trajectory_id"]
        found: list[str] = []
        for batch in self._dataset.to_batches(columns=columns, filter=self._filters.expression()):
            ids = batch["trajectory_id"].to_pylist()
            if self._filters.by_step:
                ids = [i for i, steps in zip(ids, batch["steps"], strict=True) if self._filters.passes(steps.values)]
            found += ids
        return found

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{self._folder}: its trajectories cannot be read ({one_line(error)})") from None


def _open(run: Path) -> ds.Dataset:
    folder = RunFolder(run).trajectories
    if not run.is_dir():
        raise UserError(f"run {str(run)!r}: there is no such folder; give the folder of a run or of demonstrations")
    if not folder.is_dir():
        raise UserError(f"run {str(run)!r}: it holds no trajectories ({folder} does not exist)")
    dataset = ds.dataset([str(file) for file in trajectory_files(folder)], schema=TRAJECTORY_SCHEMA, format="parquet")
    for fragment in dataset.get_fragments():
        try:
            schema = fragment.physical_schema
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{fragment.path}: not a readable trajectory file ({one_line(error)}); remove or restore it"
            ) from None
        if not is_trajectory_schema(schema):
            raise UserError(
                f"{fragment.path}: not in the trajectory schema version {SCHEMA_VERSION}; made by another release?"
            )
    return dataset


def _one_of(ids: Sequence[str]) -> ds.Expression:
    return ds.field("trajectory_id").isin(pa.array(ids, pa.string()))


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    steps = row["steps"]
    return {
        **row,
        "log_reward": row["log_rewards"][-1],
        "steps": len(steps),
        "version": max((step["policy_version"] for step in steps), default=-1),
        "actions": tuple(step["action"] for step in steps),
    }
