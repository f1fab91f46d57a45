"""The driver of a run that is disturbed: `gflowvlm train`'s, which also writes down what the workers were told is safe.

`python -m chaos.job RUN LEDGER NODE`. The ledger is the record that the trajectory files are held against: a line is
written when a worker reports a group as acknowledged, by another process than the replay buffer. NODE is the address of
the node that the driver belongs to.
"""

import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import ray
from rich.console import Console

from gflowvlm.actors.groups import GroupSummary
from gflowvlm.cluster.driver.training_run import TrainingRun
from gflowvlm.cluster.launch.ray_runtime import ray_cluster, wait_for_resources
from gflowvlm.run.console import terminal
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.interruption import INTERRUPTED, termination_as_interrupt
from gflowvlm.run.log import append_row
from gflowvlm.run.setup import open_run, run_lock
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError

GROUP = "group"


class RecordedRun(TrainingRun):
    """A run that keeps a ledger of acknowledged groups."""

    def __init__(self, folder: RunFolder, config: RunConfig, console: Console, ledger: Path) -> None:
        super().__init__(folder, config, console)
        self._ledger = ledger

    def _note_groups(self, summaries: list[GroupSummary]) -> None:
        for summary in summaries:
            group = {"group_id": summary.group_id, "trajectory_ids": summary.trajectory_ids}
            append_row(self._ledger, GROUP, group)
        super()._note_groups(summaries)


def main(run: str, ledger: str, node: str) -> int:
    """Runs the run of a folder to its end; returns the exit status that `gflowvlm train` has."""
    console = terminal()
    # Ray looks for the driver's node among this machine's processes, and takes the head where it sees several nodes.
    connect = partial(ray.init, _node_ip_address=node)
    try:
        folder, config = open_run(Path(run))
        with termination_as_interrupt(), run_lock(folder), patch.object(ray, "init", connect), ray_cluster(config):
            wait_for_resources(config, lambda line: console.print(line, highlight=False, soft_wrap=True))
            RecordedRun(folder, config, console, Path(ledger)).run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        print(f"gflowvlm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
