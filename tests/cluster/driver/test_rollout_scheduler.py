import time
from types import SimpleNamespace

from gflowvlm.actors.admission import Admission
from gflowvlm.actors.groups import GroupSummary
from gflowvlm.cluster.driver.rollout_scheduler import (
    EvaluationJob,
    RolloutScheduler,
    demonstrated_seed,
    idle_worker_calls,
    training_seed,
)
from gflowvlm.cluster.driver.worker_pool import WorkerPool
from gflowvlm.evaluation.metrics import EvaluationPlan
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.trajectory import to_record_batch
from tests.actors.made_trajectories import make_trajectory


def test_training_seeds_are_repeatable_and_never_those_of_an_evaluation():
    seeds = [training_seed(0, index) for index in range(2000)]
    assert seeds == [training_seed(0, index) for index in range(2000)]
    assert len(set(seeds)) == 2000
    assert seeds[:5] != [training_seed(1, index) for index in range(5)]
    plan = EvaluationPlan.of(RunConfig())
    assert min(seeds) >= 2**30 > plan.seeds[-1]
    assert max(seeds) < 2**31


def test_an_evaluation_is_finished_when_all_of_it_was_played():
    job = EvaluationJob(EvaluationPlan("id", instances=2, samples=3, seed=0), version=1, step=4)
    job.greedy = ["trajectory"] * 2
    job.sampled = ["trajectory"] * 5
    assert not job.finished
    job.sampled.append("trajectory")
    assert job.finished


def test_a_worker_without_training_groups_runs_more_than_fill_it_and_a_full_one_still_evaluates():
    assert idle_worker_calls(8, 0) == 4
    assert idle_worker_calls(8, 6) == 1
    assert idle_worker_calls(8, 8) == 1
    assert idle_worker_calls(1, 0) == 1


class FullWorkers:
    """Workers that take every call and end none."""

    leaving = ()

    def __init__(self, count):
        self.serving = list(range(count))
        self.calls = []

    def results(self, wait_s):
        return []

    def update(self):
        return []

    def call(self, worker, method, tag, kwargs):
        self.calls.append(worker)
        return True


def scheduler_of(workers, admission, groups_per_worker, on_evaluation=print):
    return RolloutScheduler(
        workers,
        admission,
        groups_per_worker=groups_per_worker,
        instance_seed=lambda index: index,
        next_group=0,
        rollout_version=lambda: None,
        on_groups=lambda summaries: None,
        on_evaluation=on_evaluation,
    )


def test_the_groups_that_the_capacity_rule_leaves_are_spread_over_the_workers():
    workers = FullWorkers(3)
    scheduler = scheduler_of(workers, Admission(max_staleness=0, batch=32, group_size=8), groups_per_worker=2)
    scheduler.pump()
    assert workers.calls == [0, 1, 2, 0]


def test_the_driver_looks_through_thousands_of_running_groups_in_no_time():
    groups = 4000
    workers = FullWorkers(1)
    scheduler = scheduler_of(workers, Admission(max_staleness=0, batch=8 * groups, group_size=8), groups)
    scheduler.pump()
    assert len(workers.calls) == groups
    started = time.monotonic()
    scheduler.pump()
    assert time.monotonic() - started < 0.1


def test_the_driver_rests_while_no_call_is_in_flight():
    admission = Admission(max_staleness=0, batch=8, group_size=8)
    scheduler = scheduler_of(WorkerPool(start=lambda number: None, calls=1, say=print), admission, groups_per_worker=1)
    started = time.monotonic()
    scheduler.pump(wait_s=0.2)
    assert time.monotonic() - started >= 0.2


class LastFirstWorkers(FullWorkers):
    """One worker that plays all calls at the same time, and ends the last one first."""

    def __init__(self):
        super().__init__(1)
        self.waiting = []

    def call(self, worker, method, tag, kwargs):
        self.waiting.append((tag, kwargs))
        return True

    def results(self, wait_s):
        return [self.played(*self.waiting.pop())] if self.waiting else []

    def played(self, tag, kwargs):
        requests, version = kwargs["requests"], kwargs["version"]
        names = [f"v{version}-{tag}-{r.instance_seed}-{n}" for r in requests for n in range(kwargs["group_size"])]
        batch = to_record_batch([make_trajectory(name, "g00000000-0a", version=version) for name in names])
        answer = batch, [GroupSummary(request) for request in requests]
        return SimpleNamespace(ok=True, actor_id=0, tag=tag, get=lambda: answer)


def test_evaluations_of_the_same_instances_that_overtake_each_other_keep_their_own_trajectories():
    finished = []
    scheduler = scheduler_of(
        LastFirstWorkers(),
        Admission(max_staleness=0, batch=8, group_size=8),
        groups_per_worker=64,
        on_evaluation=finished.append,
    )
    plan = EvaluationPlan("id", instances=6, samples=2, seed=0)
    for version in (0, 7):
        scheduler.evaluate(EvaluationJob(plan, version, step=version))
    assert scheduler.evaluates(7)
    while scheduler.evaluating:
        scheduler.pump(train=False)
    assert [job.version for job in finished] == [7, 0]
    assert not scheduler.evaluates(7)
    for job in finished:
        played = [*job.sampled, *job.greedy]
        assert {step.policy_version for trajectory in played for step in trajectory.steps} == {job.version}
        assert len({trajectory.trajectory_id for trajectory in played}) == 6 * 3


def test_demonstrated_instances_are_played_once_each_before_any_comes_again():
    seeds = [100, 7, 42, 9, 11]
    played = [demonstrated_seed(0, index, seeds) for index in range(15)]
    passes = [played[:5], played[5:10], played[10:]]
    assert all(sorted(one) == sorted(seeds) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert played == [demonstrated_seed(0, index, seeds) for index in range(15)]
    assert played != [demonstrated_seed(1, index, seeds) for index in range(15)]
