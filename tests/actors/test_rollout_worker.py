"""Rollout workers: what they play, report and record, and what becomes of them when processes die."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pytest
import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from gflowvlm.actors.buffer_actor import create_buffer_actor
from gflowvlm.actors.environment_process import EnvironmentProcess
from gflowvlm.actors.event_loop import EventLoopEndedError
from gflowvlm.actors.groups import FailureCause, GroupRequest, GroupSummary
from gflowvlm.actors.policy_client import PolicyServerError
from gflowvlm.actors.rollout_worker import ReplayBufferError, RolloutWorker, append_group
from gflowvlm.actors.sampling import UnknownVersionError
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.learner.tiny_policy import build_processor
from gflowvlm.shared.config import RolloutSettings, RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import EndReason, from_arrow, to_record_batch
from tests.actors.local_ray import local_ray
from tests.actors.made_trajectories import make_group
from tests.actors.misbehaving import GOOD, RELEASE, SEEDS, MisbehavingEnv, MisbehavingSettings
from tests.actors.scripted import Fixed

CONFIG = RunConfig(
    task=NumberLineSettings(max_steps=3), rollout=RolloutSettings(group_size=4, expert_on_failure=True, max_restarts=5)
)
CONCURRENT_CALLS = 3
REQUESTS = [GroupRequest(index, 1000 + index) for index in range(3)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build_processor().save_pretrained(folder)
    return str(folder)


def make_worker(model_path: str, source: Any) -> RolloutWorker:
    return RolloutWorker(run_config=CONFIG, model_path=model_path, source=source)


def test_rollouts_are_returned_with_their_summaries(model_path: str) -> None:
    source = Fixed(model_path, pause_s=0.01)
    worker = make_worker(model_path, source)
    batch, summaries = worker.rollout(requests=REQUESTS, group_size=2, temperature=0.0, version=7, sampling_seed=1)
    worker.stop()
    trajectories = from_arrow(batch)
    assert [t.instance_seed for t in trajectories] == [1000, 1000, 1001, 1001, 1002, 1002]
    assert {t.end for t in trajectories} == {EndReason.STEP_LIMIT}
    assert not any(t.expert for t in trajectories)
    assert source.together == 6
    assert {(r.temperature, r.version) for r in source.requests} == {(0.0, 7)}
    assert len({r.seed for r in source.requests}) == 18
    for summary, members in zip(summaries, (trajectories[i : i + 2] for i in (0, 2, 4)), strict=True):
        assert summary.failure is None
        assert summary.trajectory_ids == [t.trajectory_id for t in members]
        assert summary.success == [t.success for t in members]
        assert summary.length == [3, 3]
        assert summary.response_tokens == [t.response_tokens for t in members]
        assert (summary.malformed, summary.inadmissible, summary.versions) == ([0, 0], [0, 0], [7])
        assert summary.log_reward == [t.log_rewards[-1] for t in members]
        assert summary.env_seconds > 0
        assert summary.wait_seconds >= 6 * 0.01


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (PolicyServerError("waited 9 s"), FailureCause.SAMPLER),
        (UnknownVersionError("no version 9"), FailureCause.SAMPLER),
        (UserError("refused"), FailureCause.REFUSED),
    ],
)
def test_a_failed_group_is_reported_and_the_others_go_on(
    error: Exception, cause: FailureCause, model_path: str
) -> None:
    # The second state's prompt tells the groups apart by their start numbers.
    source = Fixed(model_path, error=error, fails_on="State 0: 3")
    worker = make_worker(model_path, source)
    requests = [GroupRequest(index, seed) for index, seed in enumerate(range(40))]
    batch, summaries = worker.rollout(requests=requests, group_size=1, temperature=1.0)
    worker.stop()
    failed = [s for s in summaries if s.failure is not None]
    assert 0 < len(failed) < 40
    assert batch.num_rows == 40 - len(failed)
    for summary in failed:
        assert (summary.failure, summary.cause) == (str(error), cause)
        assert summary.permanent == (cause is FailureCause.REFUSED)
        assert summary.trajectory_ids == []
    assert [s.request for s in summaries] == requests


def misbehaving_worker(model_path: str, **rollout: Any) -> RolloutWorker:
    config = RunConfig(task=MisbehavingSettings(max_steps=3), rollout=RolloutSettings(group_size=4, **rollout))
    return RolloutWorker(run_config=config, model_path=model_path, source=Fixed(model_path))


def test_an_environment_that_exits_fails_its_group_alone_with_instance_file_and_reason(model_path: str) -> None:
    worker = misbehaving_worker(model_path)
    bad = SEEDS["SystemExit"]
    requests = [GroupRequest(index, bad if index == 2 else GOOD) for index in range(6)]
    batch, summaries = worker.rollout(requests=requests, group_size=2, temperature=1.0)
    assert [s.failure is None for s in summaries] == [True, True, False, True, True, True]
    assert batch.num_rows == 5 * 2
    failed = summaries[2]
    assert failed.failure == f"numberline/id/{bad} (games/{bad}.json): SystemExit: 37"
    assert (failed.cause, failed.permanent) == (FailureCause.ENVIRONMENT, False)
    again, _ = worker.rollout(requests=requests[:1], group_size=2, temperature=1.0)
    worker.stop()
    assert again.num_rows == 2


def test_an_environment_in_the_worker_that_never_returns_is_named_and_the_worker_plays_no_more(model_path: str) -> None:
    worker = misbehaving_worker(model_path, environment_timeout_s=1.0)
    bad = SEEDS["a call without end"]
    try:
        _, (lost, failed) = worker.rollout(
            requests=[GroupRequest(0, GOOD), GroupRequest(1, bad)], group_size=1, temperature=1.0
        )
        with pytest.raises(EventLoopEndedError):
            worker.rollout(requests=[GroupRequest(0, GOOD)], group_size=1, temperature=1.0)
        with pytest.raises(AssertionError):
            worker.assert_healthy()
    finally:
        RELEASE.set()
        worker.stop()
        RELEASE.clear()
    assert (failed.cause, lost.cause) == (FailureCause.ENVIRONMENT, FailureCause.LOST)
    assert str(failed.failure).startswith(f"numberline/id/{bad} (games/{bad}.json): did not return in 1 s")
    assert str(lost.failure).startswith(f"numberline/id/{GOOD}: lost with its worker, because numberline/id/{bad}")


def test_settings_that_allow_no_environment_are_refused_at_once(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("task.games: no such folder")

    monkeypatch.setattr(MisbehavingEnv, "__init__", refuse)
    worker = misbehaving_worker(model_path)
    _, (summary,) = worker.rollout(requests=[GroupRequest(0, GOOD)], group_size=1, temperature=1.0)
    worker.stop()
    assert (summary.failure, summary.cause) == ("task.games: no such folder", FailureCause.REFUSED)


def test_calls_from_several_threads_play_at_the_same_time(model_path: str) -> None:
    source = Fixed(model_path, pause_s=0.2)
    worker = make_worker(model_path, source)
    arguments = {"requests": REQUESTS, "group_size": 2, "temperature": 1.0}
    threads = [threading.Thread(target=worker.rollout, kwargs=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    worker.stop()
    assert source.together == 12


def test_the_runner_interface_is_answered(model_path: str) -> None:
    worker = make_worker(model_path, Fixed(model_path))
    worker.assert_healthy()
    assert worker.ping() == "pong"
    observation, _ = worker.get_spaces()["__env__"]
    assert observation.shape == (64, 64, 3)
    with pytest.raises(ValueError, match="without a replay buffer"):
        worker.sample(requests=REQUESTS)
    worker.stop()


@pytest.mark.slow
def test_groups_fail_when_their_environments_process_dies_and_the_next_ones_have_a_new_one(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_by: list[str] = []
    end = EnvironmentProcess.end

    def noted(process: EnvironmentProcess, *why: str) -> None:
        ended_by.append(threading.current_thread().name)
        end(process, *why)

    monkeypatch.setattr(EnvironmentProcess, "end", noted)
    hosted = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"environment_processes": 1})})
    source = Fixed(model_path, pause_s=3.0)
    worker = RolloutWorker(run_config=hosted, model_path=model_path, source=source)
    arguments = {"requests": REQUESTS, "group_size": 2, "temperature": 1.0}
    others = set(psutil.Process().children())
    with ThreadPoolExecutor(1) as thread:
        playing = thread.submit(worker.rollout, **arguments)
        deadline = time.monotonic() + 60
        # All of them: no call is running in the process that somebody ends.
        while source.waiting < len(REQUESTS) * 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (host,) = (c for c in set(psutil.Process().children()) - others if "spawn_main" in " ".join(c.cmdline()))
        host.kill()
        batch, summaries = playing.result(timeout=60)
    assert batch.num_rows == 0
    assert all(s.failure is not None and str(host.pid) in s.failure for s in summaries)
    assert {s.cause for s in summaries} == {FailureCause.LOST}
    batch, summaries = worker.rollout(**arguments)
    worker.stop()
    assert [s.failure for s in summaries] == [None] * len(REQUESTS)
    assert batch.num_rows == 2 * len(REQUESTS)
    # Two threads that end a process together close its pipes twice, and by then these may be somebody else's.
    assert set(ended_by) == {"rollouts"}


# Under Ray


@dataclass
class Cluster:
    """A replay buffer and one worker under RLlib's manager: starting one takes several seconds."""

    folder: Path
    buffer: Any
    manager: FaultTolerantActorManager

    def stats(self) -> dict[str, Any]:
        return dict(ray.get(self.buffer.stats.remote(), timeout=60))


@pytest.fixture(scope="module")
def cluster(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("run")
    with local_ray():
        buffer = create_buffer_actor(CONFIG, folder, "buffer")
        worker = (
            ray.remote(RolloutWorker)
            .options(num_cpus=0.1, max_restarts=CONFIG.rollout.max_restarts, max_concurrency=CONCURRENT_CALLS)
            .remote(
                run_config=CONFIG,
                model_path=model_path,
                source=Fixed(model_path, pause_s=0.2),
                buffer="buffer",
            )
        )
        calls = CONCURRENT_CALLS - 1
        yield Cluster(
            folder, buffer, FaultTolerantActorManager([worker], max_remote_requests_in_flight_per_actor=calls)
        )


def ask(manager: FaultTolerantActorManager, requests: list[GroupRequest]) -> None:
    fired = manager.foreach_actor_async("sample", tag="sample", kwargs=[{"requests": requests}], remote_actor_ids=[0])
    assert fired == 1


def answers(manager: FaultTolerantActorManager, count: int, timeout_s: float = 90) -> list[Any]:
    """The next `count` results, errors included."""
    results: list[Any] = []
    deadline = time.monotonic() + timeout_s
    while len(results) < count:
        assert time.monotonic() < deadline, f"{len(results)} of {count} answers came"
        results += list(manager.fetch_ready_async_reqs(tags="sample", timeout_seconds=0.2))
    return results


def recover(manager: FaultTolerantActorManager, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while manager.num_healthy_actors() < manager.num_actors():
        assert time.monotonic() < deadline, "the worker did not come back"
        manager.probe_unhealthy_actors(timeout_seconds=1, mark_healthy=True)


def pid_of(manager: FaultTolerantActorManager) -> int:
    (result,) = manager.foreach_actor(lambda _: os.getpid(), timeout_seconds=60)
    return int(result.get())


@pytest.mark.slow
def test_workers_append_every_group_before_they_report_it(cluster: Cluster) -> None:
    manager = cluster.manager
    ask(manager, REQUESTS)
    ask(manager, [GroupRequest(7, 5), GroupRequest(8, 6)])
    summaries: list[GroupSummary] = [s for result in answers(manager, 2) for s in result.get()]
    assert sorted(s.request.group_index for s in summaries) == [0, 1, 2, 7, 8]
    # More than the larger call alone: the worker plays both at the same time.
    (together,) = manager.foreach_actor(lambda worker: worker._source.together, timeout_seconds=60)
    assert together.get() > 3 * 4
    stats = cluster.stats()
    assert stats["accepted"] == 5 * 4
    assert stats["largest_group_index"] == 8
    held = ray.get(cluster.buffer.wait_sample.remote(0, 5, 3, 20, 30.0), timeout=60)
    assert sorted(held["trajectory_id"].to_pylist()) == sorted(i for s in summaries for i in s.trajectory_ids)
    assert sum(sum(s.expert) for s in summaries) == stats["expert"]
    memory = psutil.Process(pid_of(manager)).memory_full_info().uss / 2**20
    print(f"rollout worker: {memory:.0f} MiB of its own")
    assert memory < 700


@pytest.mark.slow
def test_no_group_is_lost_while_the_buffer_restarts(cluster: Cluster) -> None:
    before = cluster.stats()
    ask(cluster.manager, [GroupRequest(index, index) for index in range(20, 28)])
    time.sleep(0.4)
    os.kill(before["pid"], signal.SIGKILL)
    (result,) = answers(cluster.manager, 1)
    assert [s.failure for s in result.get()] == [None] * 8
    after = cluster.stats()
    assert after["pid"] != before["pid"]
    assert after["accepted"] == before["accepted"] + 8 * 4
    recorded = ds.dataset(cluster.folder / "trajectories").to_table(columns=["trajectory_id"])
    acknowledged = {i for s in result.get() for i in s.trajectory_ids}
    assert acknowledged <= set(recorded["trajectory_id"].to_pylist())
    assert recorded.num_rows == after["accepted"] + after["accepted_experts"]


@pytest.mark.slow
def test_a_killed_worker_comes_back_and_the_run_goes_on(cluster: Cluster) -> None:
    manager, before = cluster.manager, cluster.stats()["accepted"]
    victim = pid_of(manager)
    ask(manager, REQUESTS)
    time.sleep(0.3)
    os.kill(victim, signal.SIGKILL)
    (lost,) = answers(manager, 1)
    assert not lost.ok
    assert manager.num_healthy_actors() == 0
    recover(manager)
    assert pid_of(manager) != victim
    ask(manager, REQUESTS)
    (result,) = answers(manager, 1)
    assert [s.failure for s in result.get()] == [None] * 3
    assert cluster.stats()["accepted"] == before + 12


@pytest.mark.slow
def test_a_defect_ends_the_process_which_comes_back(cluster: Cluster) -> None:
    victim = pid_of(cluster.manager)
    cluster.manager.foreach_actor_async(lambda worker: worker.nothing(), tag="sample")
    (failed,) = answers(cluster.manager, 1)
    assert not failed.ok
    recover(cluster.manager)
    assert pid_of(cluster.manager) != victim


@pytest.mark.slow
def test_what_the_buffer_refuses_is_a_permanent_failure(cluster: Cluster) -> None:
    (cluster.folder / "trajectories").rename(cluster.folder / "elsewhere")
    ask(cluster.manager, REQUESTS[:1])
    (result,) = answers(cluster.manager, 1)
    (cluster.folder / "elsewhere").rename(cluster.folder / "trajectories")
    (summary,) = result.get()
    assert summary.permanent
    assert "trajectories cannot be written" in summary.failure
    assert "Traceback" not in summary.failure


@pytest.mark.slow
def test_waiting_for_a_buffer_that_is_gone_ends(cluster: Cluster, tmp_path: Path) -> None:
    buffer = create_buffer_actor(CONFIG, tmp_path, "buffer-gone")
    ray.kill(buffer, no_restart=True)
    with pytest.raises(ReplayBufferError, match="for the replay buffer to take a group"):
        asyncio.run(append_group(buffer, to_record_batch(make_group(0)), deadline_s=2.0))
