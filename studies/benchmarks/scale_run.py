"""A run whose engines and learner are simulated; everything between them is what a real run has.

Real: driver, scheduler, admission, rollout workers, environments, parsing, policy server and client, adapter store,
replay buffer and its files, the learner's loop under Ray Train, log and telemetry.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from ray.serve.handle import DeploymentHandle
from rich.console import Console

from gflowvlm.actors.groups import GroupSummary
from gflowvlm.actors.policy_client import PolicyClient
from gflowvlm.actors.policy_server import deploy_policy_server
from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.cluster.driver.learner_reports import Report
from gflowvlm.cluster.driver.run_actors import RunActors
from gflowvlm.cluster.driver.training_run import TrainingRun
from gflowvlm.cluster.launch.ray_runtime import ray_cluster
from gflowvlm.run.console import terminal
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import Row, read_rows
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import read_parquet
from gflowvlm.studies.benchmarks.own_process import in_own_process
from gflowvlm.studies.benchmarks.scale_learner import simulated_learner_loop
from gflowvlm.studies.benchmarks.scale_sampler import SimulatedEngine

WARM_UP_SHARE = 0.25
"""Share of a run's trajectories that come before anything is measured: every episode began at the same time."""

SETTLED_SHARE = 0.5
"""Share of a run's trajectories that come before the growth of memory is measured: the replay buffer, full after a
quarter of the large run, has replaced its content once by then, and its allocator has what it needs."""

PROCESS_INTERVAL_S = 30.0
TOO_SHORT = "the simulated run was too short to be measured; simulate more trajectories"


@dataclass(frozen=True)
class Simulation:
    """What stands in for the models.

    Attributes:
        engine: The samplers' engines.
        learner_step_s: Time of a learner step, seconds.
        adapter_kib: Size of a published adapter.
    """

    engine: SimulatedEngine
    learner_step_s: float
    adapter_kib: int


@dataclass(frozen=True)
class Snapshot:
    """What was seen at one time.

    Attributes:
        time: Seconds since the epoch.
        replicas: Status of the samplers.
        driver_s: Processor time of the driver so far.
        processes_s: Processor time of each kind of process so far; empty at most moments.
        processes_mib: Memory that each kind of process shares with nobody; empty at the same moments.
    """

    time: float
    replicas: list[dict[str, Any]]
    driver_s: float
    processes_s: dict[str, float]
    processes_mib: dict[str, float]


@dataclass
class Observed:
    """What came of a simulated run.

    Attributes:
        config: The run's configuration.
        simulation: What was simulated.
        moments: What was seen, one for each snapshot of the rollouts, in order.
        rows: The run's log.
        reported: Ids of the trajectories that the workers reported to the driver.
        written: Ids of all trajectories on disk, with how often they stand there.
        groups_failed: Groups that failed and were played again.
    """

    config: RunConfig
    simulation: Simulation
    moments: list[Snapshot]
    rows: list[Row]
    reported: set[str] = field(default_factory=set)
    written: Counter[str] = field(default_factory=Counter)
    groups_failed: int = 0

    @property
    def lost(self) -> int:
        """Trajectories that were reported and are not on disk."""
        return len(self.reported - self.written.keys())

    @property
    def doubled(self) -> int:
        """Trajectories that stand on disk more than once."""
        return sum(count - 1 for count in self.written.values())

    @property
    def learner_s(self) -> float:
        """Time from the learner's start to the end of its last step, seconds."""
        start = next(row["time"] for row in self.rows if row["kind"] == "learner")
        return float(self._steps[-1]["time"] - start)

    @property
    def sampler_share(self) -> float:
        """Responses per second, of those of engines that are never without a request.

        Of responses, because trajectories come in waves as long as the episodes that began together go on.
        """
        sampler = self.config.sampler
        ideal = sampler.replicas * sampler.max_num_seqs / self.simulation.engine.response_s
        return self.window().responses_per_s / ideal

    @property
    def learner_share(self) -> float:
        """Learner steps per second after the warm-up, of those of a learner that never waits.

        Raises:
            UserError: The run was too short for two steps after it.
        """
        steps = self._steps[int(WARM_UP_SHARE * len(self._steps)) :]
        if len(steps) < 2:
            raise UserError(TOO_SHORT)
        return float((len(steps) - 1) * self.simulation.learner_step_s / (steps[-1]["time"] - steps[0]["time"]))

    def window(self, after: float = WARM_UP_SHARE) -> "Window":
        """Returns what happened between a share of the run's trajectories and the last snapshot.

        Raises:
            UserError: The run was too short for two snapshots in between.
        """
        snapshots = [row for row in self.rows if row["kind"] == "rollout"]
        wanted = after * self.config.learner.steps * self.config.fresh_per_step
        last = self._steps[-1]["time"]
        seen = [
            (moment, row)
            for moment, row in zip(self.moments, snapshots, strict=True)
            if row.get("accepted", -1) >= wanted
            and moment.time <= last
            and len(moment.replicas) == self.config.sampler.replicas
        ]
        if len(seen) < 2:
            raise UserError(TOO_SHORT)
        return Window([moment for moment, _ in seen], [row for _, row in seen])

    @property
    def _steps(self) -> list[Row]:
        return [row for row in self.rows if row["kind"] == "step"]


@dataclass(frozen=True)
class Window:
    """The part of a run that is measured.

    Attributes:
        moments: What was seen in it.
        rows: The snapshots of the rollouts at these moments.
    """

    moments: list[Snapshot]
    rows: list[Row]

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.moments[-1].time - self.moments[0].time

    @property
    def trajectories_per_s(self) -> float:
        """Trajectories that the replay buffer acknowledged, per second."""
        return float(self.rows[-1]["accepted"] - self.rows[0]["accepted"]) / self.seconds

    @property
    def responses_per_s(self) -> float:
        """Responses of all samplers, per second."""
        first, last = (sum(r["responses"] for r in m.replicas) for m in (self.moments[0], self.moments[-1]))
        return float(last - first) / self.seconds

    @property
    def in_flight(self) -> float:
        """Mean number of requests that the samplers had."""
        return statistics.fmean(sum(r["in_flight"] for r in moment.replicas) for moment in self.moments)

    @property
    def driver_cores(self) -> float:
        """Cores that the driver kept busy."""
        return (self.moments[-1].driver_s - self.moments[0].driver_s) / self.seconds

    @property
    def memory_gib(self) -> float:
        """Mean memory of all processes."""
        return statistics.fmean(row["memory_gib"] for row in self.rows)

    @property
    def memory_growth(self) -> float:
        """Growth of the memory over the window by a straight line through it, as a share of its mean."""
        values = [row["memory_gib"] for row in self.rows]
        slope = statistics.linear_regression([moment.time for moment in self.moments], values).slope
        return slope * self.seconds / self.memory_gib

    @property
    def cores(self) -> dict[str, float]:
        """Cores that each kind of process kept busy, most first; empty where the window is too short."""
        seen = [moment for moment in self.moments if moment.processes_s]
        if len(seen) < 2:
            return {}
        busy: dict[str, float] = defaultdict(float)
        for before, after in pairwise(seen):
            # Of processes that ended or began in between nothing is known.
            for kind in before.processes_s.keys() & after.processes_s.keys():
                busy[kind] += max(0.0, after.processes_s[kind] - before.processes_s[kind])
        return {
            kind: spent / (seen[-1].time - seen[0].time)
            for kind, spent in sorted(busy.items(), key=lambda item: -item[1])
        }

    @property
    def growth_mib_per_min(self) -> dict[str, float]:
        """Growth of the memory of each kind of process, most first; empty where the window is too short."""
        seen = [moment for moment in self.moments if moment.processes_mib]
        if len(seen) < 2:
            return {}
        minutes = [moment.time / 60 for moment in seen]
        kinds = set.intersection(*(set(moment.processes_mib) for moment in seen))
        growth = {
            kind: statistics.linear_regression(minutes, [moment.processes_mib[kind] for moment in seen]).slope
            for kind in kinds
        }
        return dict(sorted(growth.items(), key=lambda item: -item[1]))


def simulate_run(directory: Path, config: RunConfig, simulation: Simulation) -> Observed:
    """Runs to the last learner step, in a process and on a Ray of its own, and looks at what is on disk then."""
    return in_own_process(_simulated_run, directory, config, simulation)


def _simulated_run(directory: Path, config: RunConfig, simulation: Simulation) -> Observed:
    folder = new_run(config, directory)
    run = SimulatedRun(folder, config, terminal(), simulation)
    with ray_cluster(config):
        run.run()
    observed = Observed(config, simulation, run.moments, read_rows(folder.metrics), run.reported)
    observed.groups_failed = run.scheduler.groups_failed
    for path in trajectory_files(folder.trajectories):
        table = read_parquet(path)
        observed.written.update(table["trajectory_id"].to_pylist())
    return observed


class SimulatedRun(TrainingRun):
    """A run with simulated engines and a simulated learner; nothing is evaluated, since nothing is learned.

    Rollouts begin with the learner, so that it finds no stock of trajectories.

    Attributes:
        moments: What was seen at each snapshot of the rollouts.
        reported: Ids of the trajectories that the workers reported.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, console: Console, simulation: Simulation) -> None:
        super().__init__(folder, config, console)
        self._simulation = simulation
        self.moments: list[Snapshot] = []
        self.reported: set[str] = set()
        self._driver = psutil.Process()
        self._processes_at = 0.0

    def _make_actors(self) -> RunActors:
        return SimulatedActors(
            self.folder, self.config, self.model_path, self.display.say, self.record.append_report, self._simulation
        )

    def _rollouts_wanted(self) -> bool:
        return self.state.learning and super()._rollouts_wanted()

    def _evaluate_if_new(self, step: int, version: int) -> None:
        return None

    def _report(self) -> list[Row]:
        return []

    def _note_groups(self, summaries: list[GroupSummary]) -> None:
        super()._note_groups(summaries)
        for summary in summaries:
            self.reported.update(summary.trajectory_ids)

    def _snapshot(self) -> None:
        super()._snapshot()
        times = self._driver.cpu_times()
        spent: dict[str, float] = {}
        held: dict[str, float] = {}
        if time.monotonic() - self._processes_at >= PROCESS_INTERVAL_S:
            self._processes_at = time.monotonic()
            spent, held = processes_of(self._driver)
        client = self._actors.client
        seen = client.seen if isinstance(client, ObservedClient) else []
        self.moments.append(Snapshot(time.time(), seen, times.user + times.system, spent, held))


class SimulatedActors(RunActors):
    """A run's parts, with simulated engines and a simulated learner."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        model_path: str,
        say: Callable[[str], None],
        append_report: Callable[[Report], None],
        simulation: Simulation,
    ) -> None:
        super().__init__(folder, config, model_path, say, append_report)
        self.engine = "SIMULATED engines"
        self._simulation = simulation

    def __enter__(self) -> "SimulatedActors":
        super().__enter__()
        self.client = ObservedClient.from_config(self.client.handle, self._config)
        return self

    def _deploy_policy_server(self) -> DeploymentHandle:
        return deploy_policy_server(
            self._config,
            self._model_path,
            store_name=f"{self._name}-store",
            name=f"{self._name}-policy",
            start_sampler=self._simulation.engine,
        )

    def _learner_loop(self) -> Callable[[dict[str, Any]], None]:
        simulation = self._simulation
        return partial(simulated_learner_loop, step_s=simulation.learner_step_s, adapter_kib=simulation.adapter_kib)


@dataclass
class ObservedClient(PolicyClient):
    """A client that remembers what the replicas told the driver last.

    Attributes:
        seen: Their last statuses.
    """

    seen: list[dict[str, Any]] = field(default_factory=list)

    async def status(self, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """Returns every running replica's status; see `PolicyClient.status`."""
        self.seen = await super().status(timeout_s)
        return self.seen


def processes_of(driver: psutil.Process) -> tuple[dict[str, float], dict[str, float]]:
    """Looks at the driver and all it started.

    Returns:
        Processor time so far, seconds, and resident memory that is not shared, MiB; both by kind of process.
    """
    spent: dict[str, float] = defaultdict(float)
    held: dict[str, float] = defaultdict(float)
    for process in (driver, *driver.children(recursive=True)):
        try:
            times, memory = process.cpu_times(), process.memory_info()
            kind = "driver" if process == driver else process_kind(process.cmdline())
        except psutil.Error:
            continue
        spent[kind] += times.user + times.system
        held[kind] += (memory.rss - getattr(memory, "shared", 0)) / 2**20
    return spent, held


def process_kind(command: Sequence[str]) -> str:
    """Returns what a process of Ray's is by its command line, such as ``RolloutWorker`` or ``raylet``."""
    title = " ".join(command)
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split(".")[0].split(":")[-1].split("(")[0].strip() or "worker"
    for kind in ("gcs_server", "raylet", "dashboard", "monitor", "log_monitor", "agent"):
        if kind in title:
            return kind
    return command[0].rsplit("/", 1)[-1] if command else "ended"
