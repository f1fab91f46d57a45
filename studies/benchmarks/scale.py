"""What a run's parts hold at a scale that this machine has no GPUs for: the parts scale, overlap and publish.

The engines and the learner are SIMULATED (`scale_sampler`, `scale_learner`): they take time and compute nothing. All
else is what a run has; docs/scale.md says what is measured and what that does not show.
"""

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.studies.benchmarks.measurement import Measurement, Say
from gflowvlm.studies.benchmarks.scale_publish import publish_times
from gflowvlm.studies.benchmarks.scale_run import SETTLED_SHARE, Observed, Simulation, simulate_run
from gflowvlm.studies.benchmarks.scale_sampler import RecordedResponse, SimulatedEngine
from gflowvlm.studies.benchmarks.scale_sizes import SimulatedScale
from gflowvlm.studies.benchmarks.workload import made_groups

SCALE, OVERLAP, PUBLISH = "scale", "overlap", "publish"

THROUGHPUT_BAR = 0.95
LINEAR_BAR = 0.95
DRIVER_BAR = 0.2
MEMORY_BAR = 0.02
OVERLAP_BAR = 1.1
PUBLISH_BAR = 2.0

FASTER, SLOWER = 1.25, 0.6
"""Speed of the simulated learner against the simulated samplers', where these limit a run and where it does."""

RECORDED_GROUPS = 32
SIMULATED_LOG_PROB = -0.25
OVERLAP_MOVES = 4
OVERLAP_SPREAD = 0.05
OVERLAP_ENVIRONMENTS_PER_PLACE = 2
"""With one, a place is empty while its environment draws its next picture, and while it waits for its group's last."""


class SimulatedRuns:
    """The measurements; each starts a Ray of its own.

    Args:
        config: The task, the policy's tokenizer and the group size.
        model_path: The policy's directory or hub name.
        scale: How much is simulated.
        say: Shows a line of progress.
    """

    def __init__(self, config: RunConfig, model_path: str, scale: SimulatedScale, say: Say) -> None:
        self._base, self._model_path, self._scale = config, model_path, scale
        self._say = say

    def measured(self, parts: set[str]) -> list[Measurement]:
        """Returns the measurements of the parts among `SCALE`, `OVERLAP` and `PUBLISH`."""
        measurements: list[Measurement] = []
        with tempfile.TemporaryDirectory(prefix="gflowvlm-simulated-") as folder:
            if SCALE in parts:
                measurements += self._scaled(Path(folder))
            if OVERLAP in parts:
                measurements += self._overlapped(Path(folder))
            if PUBLISH in parts:
                measurements += self._published(Path(folder))
        return measurements

    def _scaled(self, folder: Path) -> list[Measurement]:
        scale = self._scale
        engine = self._engine(recorded_responses(self._base, self._model_path, stops=True))
        self._say("one simulated sampler, which limits the run")
        one = self._run(folder / "one", self.config(1), engine, FASTER, scale.few_trajectories)
        self._say("one simulated sampler, and a learner that limits the run")
        slow = self._run(folder / "slow", self.config(1), engine, SLOWER, scale.few_trajectories)
        self._say(f"{scale.samplers} simulated samplers")
        config = self.config(scale.samplers, processes=scale.processes)
        many = self._run(folder / "many", config, engine, FASTER, scale.trajectories)
        return scale_measurements(one, slow, many)

    def _overlapped(self, folder: Path) -> list[Measurement]:
        scale = self._scale
        size = self._base.rollout.group_size
        groups = scale.overlap_places // size
        moves = recorded_responses(self._base, self._model_path, stops=False)
        engine = SimulatedEngine(moves, scale.overlap_response_s, OVERLAP_SPREAD, scale.load_s)
        work_s = OVERLAP_MOVES * scale.overlap_response_s
        seconds = {}
        for name, staleness in (("overlapped", 3), ("synchronous", 0)):
            self._say(f"{scale.overlap_steps} simulated learner steps, {name}")
            config = self._changed(
                {
                    "task": {"max_steps": OVERLAP_MOVES},
                    "sampler": {"replicas": 1, "max_num_seqs": groups * size},
                    "rollout": {"workers": 1, "groups_per_worker": OVERLAP_ENVIRONMENTS_PER_PLACE * groups},
                    "buffer": {"newest_share": 1.0, "max_staleness": staleness, "replay_staleness": 8},
                    "learner": {"groups_per_batch": groups, "steps": scale.overlap_steps},
                }
            )
            simulation = Simulation(engine, work_s, scale.adapter_kib)
            observed = simulate_run(folder / name, config, simulation)
            seconds[name] = observed.learner_s
        each = scale.overlap_steps * work_s
        how = (
            f"SIMULATED: {scale.overlap_steps} steps, each {work_s:g} s of learning and {work_s:g} s to play its "
            f"{groups * size} trajectories"
        )
        return [
            Measurement(
                OVERLAP,
                "overlap_wall_ratio",
                seconds["overlapped"] / each,
                "ratio",
                f"wall time / time of either of the two; {how}",
                at_most=OVERLAP_BAR,
            ),
            Measurement(
                OVERLAP,
                "overlap_synchronous_wall_ratio",
                seconds["synchronous"] / each,
                "ratio",
                f"the same with buffer.max_staleness=0, where each waits for the other; {how}",
            ),
        ]

    def _published(self, folder: Path) -> list[Measurement]:
        scale = self._scale
        engine = self._engine(())
        measurements: list[Measurement] = []
        p95: dict[int, float] = {}
        for replicas in (1, scale.publish_replicas):
            self._say(f"publishing {scale.publishes} adapters to {replicas} simulated replicas")
            config = self.config(replicas)
            store = folder / f"store-{replicas}"
            times = publish_times(config, self._model_path, engine, scale.adapter_kib, scale.publishes, store)
            p95[replicas] = statistics.quantiles(times, n=20, method="inclusive")[18]
            what = (
                f"SIMULATED engines: p95 of {len(times)}: publish called -> newest on all of {replicas}, of which "
                f"{scale.load_s:g} s are the simulated loading; nothing else in flight"
            )
            measurements.append(Measurement(PUBLISH, f"publish_{replicas}_p95_s", p95[replicas], "s", what))
        ratio = p95[scale.publish_replicas] / p95[1]
        what = f"p95 for {scale.publish_replicas} simulated replicas / p95 for one"
        return [*measurements, Measurement(PUBLISH, "publish_ratio", ratio, "ratio", what, at_most=PUBLISH_BAR)]

    def _run(
        self, folder: Path, config: RunConfig, engine: SimulatedEngine, learner_speed: float, trajectories: int
    ) -> Observed:
        steps = math.ceil(trajectories / config.fresh_per_step)
        config = _with(config, {"learner": {"steps": steps, "checkpoint_every": steps}})
        rate = config.sampler.replicas * config.sampler.max_num_seqs / engine.response_s
        step_s = config.fresh_per_step * expected_responses(engine, config.task.max_steps) / rate / learner_speed
        simulation = Simulation(engine, step_s, self._scale.adapter_kib)
        return simulate_run(folder, config, simulation)

    def _engine(self, responses: tuple[RecordedResponse, ...]) -> SimulatedEngine:
        return SimulatedEngine(responses, self._scale.response_s, self._scale.spread, self._scale.load_s)

    def config(self, samplers: int, processes: int = 1) -> RunConfig:
        """Returns a run with so many simulated samplers and the environments to fill them."""
        scale = self._scale
        groups = samplers * scale.environments_per_sampler // self._base.rollout.group_size
        return self._changed(
            {
                "sampler": {"replicas": samplers, "max_num_seqs": scale.places},
                "rollout": {"workers": processes, "groups_per_worker": groups // processes},
                "buffer": {
                    "capacity": 2 * groups * self._base.rollout.group_size,
                    "newest_share": 0.5,
                    # Beyond what is being played: the batch that the learner has, and the one that it waits for.
                    "max_staleness": scale.batches_in_play + 2,
                    "replay_staleness": 8 * scale.batches_in_play,
                },
                "learner": {"groups_per_batch": 2 * max(1, groups // scale.batches_in_play)},
            }
        )

    def _changed(self, changes: dict[str, dict[str, Any]]) -> RunConfig:
        usual: dict[str, dict[str, Any]] = {
            "objective": {"loss": "var_tb"},
            # Slots in Ray's books; what the processes use is measured.
            "sampler": {"cpus_per_replica": 0.0, "request_timeout_s": 3600.0},
            "rollout": {"cpus_per_worker": 0.0, "epsilon": 0.0, "expert_on_failure": False},
            "learner": {"workers": 1, "publish_every": 1, "max_failures": 0, "data_timeout_s": 3600.0},
        }
        return _with(_with(self._base, usual), changes)


def recorded_responses(config: RunConfig, model_path: str, *, stops: bool) -> tuple[RecordedResponse, ...]:
    """Returns the responses of demonstrated episodes, for `SimulatedEngine`; without `stops` none says `[DONE]`."""
    groups = made_groups(config, PolicyInputs.load(model_path, config.task.answer_format), RECORDED_GROUPS, stops=stops)
    return tuple(
        RecordedResponse(step.response_ids, [SIMULATED_LOG_PROB] * len(step.response_ids), step.response_text)
        for group in groups
        for trajectory in group
        for step in trajectory.steps
    )


def expected_responses(engine: SimulatedEngine, max_steps: int) -> float:
    """Returns the mean number of responses in an episode: each is drawn, and `[DONE]` or the step limit ends it."""
    done = sum(DONE_TOKEN in response.text for response in engine.responses) / len(engine.responses)
    return sum((1.0 - done) ** step for step in range(max_steps))


def scale_measurements(one: Observed, slow: Observed, many: Observed) -> list[Measurement]:
    """Returns the measurements of three runs.

    Args:
        one: One sampler, which limits the run.
        slow: One sampler, and a learner that limits the run.
        many: Many samplers, which limit the run.
    """
    window, few = many.window(), one.window()
    settled = many.window(SETTLED_SHARE)
    sampler = many.config.sampler
    how = f"SIMULATED engines and learner: {sampler.replicas} samplers of {sampler.max_num_seqs} places"
    environments = many.config.rollout.rollouts_at_once
    linear = window.responses_per_s / (sampler.replicas * few.responses_per_s)

    def measurement(name: str, value: float, unit: str, what: str, **bar: float) -> Measurement:
        return Measurement(SCALE, f"scale_{name}", value, unit, what, **bar)

    measurements = [
        measurement("trajectories", many.written.total(), "trajectories", f"on disk at the end; {how}"),
        measurement("environments", environments, "environments", f"in {many.config.rollout.workers} worker processes"),
        measurement("in_flight", window.in_flight, "requests", "at the samplers, mean over the measured time"),
        measurement("trajectories_per_s", window.trajectories_per_s, "trajectories/s", f"acknowledged; {how}"),
        measurement("responses_per_s", window.responses_per_s, "responses/s", how),
        measurement(
            "throughput_share",
            many.sampler_share,
            "share",
            f"responses/s of the ideal min(sampler, learner), the samplers being slower; {how}",
            at_least=THROUGHPUT_BAR,
        ),
        measurement(
            "learner_bound_share",
            slow.learner_share,
            "share",
            "steps/s of the ideal min(sampler, learner), the learner being slower; one sampler",
            at_least=THROUGHPUT_BAR,
        ),
        measurement(
            "linear",
            linear,
            "share",
            f"responses/s of {sampler.replicas} samplers / {sampler.replicas} x those "
            "of one, each with environments to match",
            at_least=LINEAR_BAR,
        ),
        measurement("driver_cores", window.driver_cores, "cores", "processor time of the driver", at_most=DRIVER_BAR),
        measurement("memory_gib", window.memory_gib, "GiB", "all processes, shared pages once"),
        measurement(
            "memory_growth",
            settled.memory_growth,
            "share",
            f"over the last {1 - SETTLED_SHARE:.0%} of the trajectories, by a straight line",
            at_most=MEMORY_BAR,
        ),
        measurement("lost", many.lost, "trajectories", "reported to the driver, not on disk", at_most=0),
        measurement("doubled", many.doubled, "trajectories", "on disk more than once", at_most=0),
        measurement("groups_failed", many.groups_failed, "groups", "failed and played again", at_most=0),
    ]
    measurements += [
        measurement(f"cores_{kind}", cores, "cores", f"processor time of {kind}")
        for kind, cores in window.cores.items()
        if cores >= 0.005
    ]
    return measurements + [
        measurement(
            f"growth_{kind}", growth, "MiB/min", f"memory of {kind}, over the same trajectories as scale_memory_growth"
        )
        for kind, growth in settled.growth_mib_per_min.items()
        if growth >= 0.1
    ]


def _with(config: RunConfig, changes: dict[str, dict[str, Any]]) -> RunConfig:
    values = config.model_dump()
    for section, changed in changes.items():
        values[section] |= changed
    return RunConfig.model_validate(values)
