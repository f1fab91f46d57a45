"""Simulated runs: what is simulated behaves as it says, and the measurements are those of what happened."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pytest

from gflowvlm.actors.sampling import SampleRequest
from gflowvlm.learner.tiny_policy import build_processor
from gflowvlm.shared.cluster_settings import ClusterSettings
from gflowvlm.shared.config import PolicySettings, RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.benchmarks.measurement import PARTS, USUAL_PARTS
from gflowvlm.studies.benchmarks.scale import SimulatedRuns, expected_responses, recorded_responses, scale_measurements
from gflowvlm.studies.benchmarks.scale_learner import SimulatedLearner
from gflowvlm.studies.benchmarks.scale_publish import publish_times
from gflowvlm.studies.benchmarks.scale_run import Observed, Simulation, Snapshot, process_kind, simulate_run
from gflowvlm.studies.benchmarks.scale_sampler import RecordedResponse, SimulatedEngine, SimulatedSampler
from gflowvlm.studies.benchmarks.scale_sizes import SimulatedScale
from tests.actors.made_trajectories import make_trajectory

ANSWER = RecordedResponse([1, 2, 3], [-0.25] * 3, '{"thoughts": "", "action": "+"}')
REQUEST = SampleRequest("prompt", b"picture", 16, 1.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("model")
    build_processor().save_pretrained(folder)
    return RunConfig(
        policy=PolicySettings(model=str(folder)), cluster=ClusterSettings(dashboard=False, object_store_mib=80)
    )


def engine(response_s: float = 0.1, spread: float = 0.0, load_s: float = 0.0) -> SimulatedEngine:
    return SimulatedEngine((ANSWER,), response_s, spread, load_s)


def test_the_simulated_parts_are_measured_on_request_only() -> None:
    assert {"scale", "overlap", "publish"} == set(PARTS) - set(USUAL_PARTS)


def test_a_simulated_engine_has_so_many_places_and_the_others_wait() -> None:
    async def play() -> tuple[float, dict[str, Any]]:
        sampler = SimulatedSampler(engine(0.1), places=2)
        started = time.monotonic()
        answers = await asyncio.gather(*(sampler.sample(REQUEST) for _ in range(6)))
        assert {(answer.text, answer.version) for answer in answers} == {(ANSWER.text, 0)}
        return time.monotonic() - started, sampler.stats()

    elapsed, stats = asyncio.run(play())
    assert 0.3 <= elapsed < 0.6
    assert stats["simulated_s"] == pytest.approx(0.6)
    assert (stats["responses"], stats["tokens"], stats["in_flight"]) == (6, 18, 0)


def test_a_late_host_does_not_slow_the_simulated_engine_down() -> None:
    async def play() -> float:
        sampler = SimulatedSampler(engine(0.1), places=1)
        answers = [asyncio.create_task(sampler.sample(REQUEST)) for _ in range(5)]
        await asyncio.sleep(0)
        started = time.monotonic()
        time.sleep(0.4)
        await asyncio.gather(*answers)
        return time.monotonic() - started

    assert asyncio.run(play()) < 0.6


def test_response_times_have_the_mean_asked_for_and_vary_unless_told_not_to() -> None:
    rng = random.Random(0)
    times = [engine(2.0, spread=0.5).duration(rng) for _ in range(20_000)]
    assert fmean(times) == pytest.approx(2.0, rel=0.02)
    assert max(times) > 4 * min(times)
    assert engine(2.0).duration(rng) == 2.0


def test_a_request_keeps_the_version_with_which_it_was_admitted() -> None:
    async def play() -> tuple[int, int, dict[str, Any]]:
        sampler = SimulatedSampler(engine(0.2, load_s=0.05), places=4)
        first = asyncio.create_task(sampler.sample(REQUEST))
        await asyncio.sleep(0)
        started = time.monotonic()
        await sampler.load(1, Path("adapter"))
        assert time.monotonic() - started >= 0.05
        return (await first).version, (await sampler.sample(REQUEST)).version, sampler.stats()

    before, after, stats = asyncio.run(play())
    assert (before, after) == (0, 1)
    assert time.time() - stats["newest_since"][1] < 5


def test_the_expected_length_of_an_episode_is_what_drawing_responses_comes_to(config: RunConfig) -> None:
    responses = recorded_responses(config, config.policy.model, stops=True)
    drawn, rng, lengths = SimulatedEngine(responses, 1.0, 0.0, 0.0), random.Random(0), []
    for _ in range(4000):
        texts = [rng.choice(responses).text for _ in range(config.task.max_steps)]
        stop = next((i for i, text in enumerate(texts) if "[DONE]" in text), len(texts) - 1)
        lengths.append(stop + 1)
    assert expected_responses(drawn, config.task.max_steps) == pytest.approx(fmean(lengths), rel=0.05)
    moves = recorded_responses(config, config.policy.model, stops=False)
    assert expected_responses(SimulatedEngine(moves, 1.0, 0.0, 0.0), 4) == 4


def test_a_simulated_learner_takes_its_time_and_its_checkpoint_restores_its_steps(tmp_path: Path) -> None:
    learner = SimulatedLearner(0.1, adapter_kib=4)
    started = time.monotonic()
    assert learner.step([make_trajectory("t")])["response_tokens"] == 6
    assert time.monotonic() - started >= 0.1
    learner.save(tmp_path / "step")
    again = SimulatedLearner(0.1, adapter_kib=4)
    again.load(tmp_path / "step")
    assert again.steps_taken == 1


def observed(config: RunConfig, samplers: int, rate: float, **changed: Any) -> Observed:
    """A made-up run of 100 s in which `rate` trajectories a second of 4 responses were accepted."""
    runs = SimulatedRuns(config, config.policy.model, SimulatedScale(), print)
    run = runs.config(samplers)
    steps = int(100 * rate / run.fresh_per_step)
    run = run.model_copy(update={"learner": run.learner.model_copy(update={"steps": steps})})
    moments, rows = [], [{"kind": "learner", "time": 0.0, "step": 0}]
    for second in range(0, 101, 5):
        replicas = [{"responses": 4 * rate * second / samplers, "in_flight": 10} for _ in range(samplers)]
        rows.append({"kind": "step", "time": 1.0 + second, "step": second // 5})
        held = {"raylet": 100.0 + second / 30, "PolicyServer": 500.0 - second}
        moments.append(Snapshot(float(second), replicas, 0.1 * second, {"raylet": 0.5 * second}, held))
        accepted = int(rate * second)
        rows.append({"kind": "rollout", "time": float(second), "accepted": accepted, "memory_gib": 4 + second / 1000})

    simulation = Simulation(SimulatedEngine((ANSWER,), 16.0, 0.0, 0.0), 4.9, 1)
    written = Counter({f"t{i}": 1 for i in range(100)})
    values = {"reported": {"t1", "t2"}, "written": written, **changed}
    return Observed(run, simulation, moments, rows, **values)


def test_figures_are_those_of_the_measured_part_of_the_run(config: RunConfig) -> None:
    one, many = observed(config, 1, 3.6), observed(config, 16, 64 * 0.96)
    measurements = {
        measurement.name: measurement for measurement in scale_measurements(one, observed(config, 1, 3.9), many)
    }
    # 16 samplers of 256 places, 16 s a response, 4 responses a trajectory: 64 trajectories/s are ideal.
    assert measurements["scale_throughput_share"].value == pytest.approx(0.96, rel=0.01)
    assert measurements["scale_throughput_share"].met is True
    assert measurements["scale_linear"].value == pytest.approx(64 * 0.96 / (16 * 3.6))
    # A step every 5 s after the warm-up, of which 4.9 s are the simulated learner's.
    assert measurements["scale_learner_bound_share"].value == pytest.approx(4.9 / 5)
    assert measurements["scale_in_flight"].value == 160
    assert measurements["scale_driver_cores"].value == pytest.approx(0.1)
    assert measurements["scale_cores_raylet"].value == pytest.approx(0.5)
    assert 0.0 < measurements["scale_memory_growth"].value < 0.025
    # 1 MiB every 30 s; what shrinks is not said.
    assert measurements["scale_growth_raylet"].value == pytest.approx(2.0)
    assert "scale_growth_PolicyServer" not in measurements
    assert measurements["scale_lost"].value == measurements["scale_doubled"].value == 0


def test_a_trajectory_lost_or_doubled_is_counted(config: RunConfig) -> None:
    run = observed(config, 1, 3.0, reported={"t1", "gone"}, written=Counter({"t1": 2, "t3": 1}))
    assert (run.lost, run.doubled) == (1, 1)


def test_a_run_too_short_to_be_measured_is_refused(config: RunConfig) -> None:
    run = observed(config, 1, 3.0)
    del run.moments[1:], run.rows[2:-1]
    with pytest.raises(UserError, match="too short"):
        run.window()


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["ray::RolloutWorker.sample"], "RolloutWorker"),
        (["ray::ServeReplica:simulated:PolicyServer.handle"], "PolicyServer"),
        (["/x/ray/core/src/ray/raylet/raylet", "--a"], "raylet"),
        (["/bin/sh", "-c"], "sh"),
        ([], "ended"),
    ],
)
def test_processes_are_known_by_their_titles(command: list[str], kind: str) -> None:
    assert process_kind(command) == kind


IN_OWN_PROCESS = """
import os, time
from pathlib import Path
import sys
from gflowvlm.studies.benchmarks.own_process import in_own_process

def work(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    in_own_process(work, sys.argv[1])
"""


def test_a_run_s_process_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(IN_OWN_PROCESS)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pid")]
    started = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + 60
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        started.kill()
        started.wait(10)
    while psutil.pid_exists(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_small_simulated_run_is_whole_and_its_adapters_reach_all_replicas(config: RunConfig, tmp_path: Path) -> None:
    scale = SimulatedScale(
        places=8, environments_per_sampler=16, batches_in_play=2, processes=1, response_s=0.2, load_s=0.05
    )
    runs = SimulatedRuns(config, config.policy.model, scale, print)
    responses = recorded_responses(config, config.policy.model, stops=True)
    simulated = SimulatedEngine(responses, scale.response_s, scale.spread, scale.load_s)
    run = runs.config(2)
    run = run.model_copy(update={"learner": run.learner.model_copy(update={"steps": 20})})
    seen = simulate_run(tmp_path / "run", run, Simulation(simulated, 0.1, adapter_kib=4))
    times = publish_times(run, config.policy.model, simulated, 4, 2, tmp_path / "store")
    assert (seen.lost, seen.doubled, seen.groups_failed) == (0, 0, 0)
    assert seen.written.total() >= 20 * run.fresh_per_step
    assert seen.reported
    assert [row["step"] for row in seen.rows if row["kind"] == "step"] == list(range(1, 21))
    assert all(0.05 <= seconds < 10 for seconds in times)
    assert len(times) == 2
