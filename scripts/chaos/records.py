"""What a run has written, read for the proof: nothing here is taken from a process, only from files."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.killing import JobFiles
from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.run.adapters import adapter_versions
from gflowvlm.run.final_report import before_and_after
from gflowvlm.run.log import Row, RowTail
from gflowvlm.run.setup import open_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.trajectory import BASE_VERSION, read_parquet


@dataclass
class Records:
    """The records of one run.

    Attributes:
        config: Its configuration.
        rows: Its log in the order in which it was written, steps included that a restart has undone.
        acknowledged: Ids of the trajectories that the ledger holds.
        written: Ids of all trajectories on disk, with how often they stand there.
        groups: Number of the policy's trajectories on disk, by group.
        newest_played: The newest version that any of them names.
        adapters: Versions whose adapters are on disk, ascending.
        kills: What was killed, in order.
        summary: The run's own summary; None while it has not ended.
    """

    config: RunConfig
    rows: list[Row]
    acknowledged: set[str]
    written: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    newest_played: int = BASE_VERSION
    adapters: list[int] = field(default_factory=list)
    kills: list[Row] = field(default_factory=list)
    summary: dict[str, Any] | None = None

    def rows_of(self, *kinds: str) -> list[Row]:
        """Returns the rows of some kinds, in order."""
        return [row for row in self.rows if row["kind"] in kinds]

    @property
    def learning_s(self) -> float | None:
        """Seconds from the learner's first start to its last step; None without a step."""
        starts, steps = self.rows_of("learner"), self.rows_of("step")
        return float(steps[-1]["time"] - starts[0]["time"]) if starts and steps else None

    @property
    def final(self) -> dict[str, Row]:
        """The final evaluations of the trained policy, by split."""
        if self.summary is None:
            return {}
        played = before_and_after(self.summary["report"], self.summary["version"])
        return {split: rows.after for split, rows in played.items() if rows.after is not None}


def read_records(files: JobFiles) -> Records:
    """Reads what a run and its driver's ledger hold.

    Raises:
        UserError: The run's folder is missing, or a trajectory file is damaged.
    """
    folder, config = open_run(files.run.root)
    ledger = rows_in(files.ledger)
    records = Records(
        config=config,
        rows=rows_in(folder.metrics),
        acknowledged={name for row in ledger for name in row["trajectory_ids"]},
        adapters=adapter_versions(folder),
        kills=rows_in(files.kills),
        summary=json.loads(folder.summary.read_text()) if folder.summary.exists() else None,
    )
    members: dict[str, set[str]] = defaultdict(set)
    for path in trajectory_files(folder.trajectories):
        table = read_parquet(path).select(["trajectory_id", "group_id", "expert", "steps"])
        for row in table.to_pylist():
            records.written[row["trajectory_id"]] += 1
            if not row["expert"]:
                members[row["group_id"]].add(row["trajectory_id"])
            versions = [step["policy_version"] for step in row["steps"]]
            records.newest_played = max([records.newest_played, *versions])
    records.groups = Counter({name: len(trajectories) for name, trajectories in members.items()})
    return records


def rows_in(path: Path) -> list[Row]:
    """Returns all rows of a log, none where there is no log."""
    return RowTail(path).new_rows()
