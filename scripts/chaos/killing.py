"""Runs a job on a local cluster, and kills its parts as a schedule says."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.nodes import END_S, LocalCluster
from chaos.schedule import HEAD, NETWORK, NODE, Kill
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import RowTail, append_row
from gflowvlm.shared.errors import UserError

LOOK_S = 0.1
STOP_S = 180.0
"""How long an interrupted job may take to write its checkpoint and take down what it started."""

KILL = "kill"


@dataclass(frozen=True)
class JobFiles:
    """Where a job's records stand.

    Attributes:
        run: The run's folder.
        ledger: What was acknowledged, one group a line.
        kills: What was killed, one kill a line.
        output: What the job printed.
    """

    run: RunFolder
    ledger: Path
    kills: Path
    output: Path

    @classmethod
    def under(cls, out: Path, name: str) -> "JobFiles":
        """Returns the places of the job of that name in a folder."""
        run = RunFolder(out / name)
        return cls(run, out / f"{name}.acknowledged.jsonl", out / f"{name}.kills.jsonl", out / f"{name}.log")


class Job:
    """A running job, and how far it is."""

    def __init__(self, files: JobFiles, cluster: LocalCluster) -> None:
        self.files = files
        self._tail = RowTail(files.run.metrics)
        self.step = 0
        arguments = str(files.run.root), str(files.ledger), cluster.drivers_node.address
        with files.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*cluster.driver_prefix, sys.executable, "-m", "chaos.job", *arguments],
                env={**cluster.environment, "COLUMNS": "200"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self.process.poll() is not None

    def look(self) -> int:
        """Returns the newest learner step."""
        for row in self._tail.new_rows():
            if row["kind"] in ("step", "learner"):
                self.step = int(row["step"])
        return self.step

    def stop(self) -> None:
        """Ends it as Ctrl-C does, or kills it when that takes too long."""
        if self.ended:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=END_S)


def run_job(
    files: JobFiles, cluster: LocalCluster, plan: Sequence[Kill], patience_s: float, say: Callable[[str], None]
) -> int:
    """Runs a job to its end and kills what the plan says on the way.

    Args:
        files: Where the run is, and what is written about it.
        cluster: Where it runs.
        plan: The kills, in order of their steps.
        patience_s: Longest time without a new learner step, and for the job's end after the last kill's step.
        say: Called with a line about each kill.

    Returns:
        The job's exit status.

    Raises:
        UserError: The job stood still for longer than that.
    """
    job = Job(files, cluster)
    try:
        for number, kill in enumerate(plan, start=1):
            if not _reached(job, kill.step, patience_s):
                break
            time.sleep(kill.delay_s)
            row = _kill(kill, job, cluster, patience_s)
            if row is None:
                break
            append_row(files.kills, KILL, {"number": number, **row})
            say(f"kill {number} of {len(plan)}: {kill.part.name} (process {row['pid']}) after step {row['step']}")
            if kill.part in (NODE, NETWORK):
                cluster.add_worker()
                say("another worker node has joined")
        while not job.ended:
            # Steps grow to the last; the final evaluation has the same patience once more.
            _reached(job, job.look() + 1, patience_s)
        return int(job.process.returncode)
    finally:
        job.stop()


def _reached(job: Job, step: int, patience_s: float) -> bool:
    """Waits for a learner step; False when the job ends before it."""
    seen, since = job.look(), time.monotonic()
    while job.look() < step:
        if job.step != seen:
            seen, since = job.step, time.monotonic()
        if job.ended:
            return False
        if time.monotonic() - since > patience_s:
            raise UserError(
                f"the job stood still at learner step {job.step} for {patience_s:g} s; see {job.files.output}"
            )
        time.sleep(LOOK_S)
    return True


def _kill(kill: Kill, job: Job, cluster: LocalCluster, patience_s: float) -> dict[str, object] | None:
    """Kills one process, once there is one to kill; None when the job ends before that."""
    since = time.monotonic()
    while not job.ended:
        now, step = round(time.time(), 3), job.look()
        title = kill.part.title
        pid = _kill_node(kill, cluster) if title is None else kill_one(cluster.processes(title), kill)
        if pid is not None:
            return {"time": now, "part": kill.part.name, "pid": pid, "step": step, "wanted_step": kill.step}
        if time.monotonic() - since > patience_s:
            raise UserError(f"no process of the {kill.part.name} to kill in {patience_s:g} s; see {job.files.output}")
        time.sleep(LOOK_S)
    return None


def _kill_node(kill: Kill, cluster: LocalCluster) -> int:
    if kill.part == HEAD:
        return cluster.lose_head()
    node = cluster.workers[int(kill.pick * len(cluster.workers))]
    return cluster.cut_off(node) if kill.part == NETWORK else cluster.kill_worker(node)


def kill_one(victims: Sequence[psutil.Process], kill: Kill) -> int | None:
    """Kills the process that the kill picks; returns its id, None where there is none."""
    if not victims:
        return None
    victim = victims[int(kill.pick * len(victims))]
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return None
    return int(victim.pid)
