import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gflowvlm.actors.admission import Admission, Pacing
from gflowvlm.actors.groups import FailureCause, GroupSummary
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
from gflowvlm.shared.errors import UserError
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

    draining = ()

    def __init__(self, count):
        self.serving = list(range(count))
        self.wanted = count
        self.calls = []

    def results(self, wait_s):
        return []

    def update(self):
        return []

    def call(self, worker, method, tag, kwargs):
        self.calls.append(worker)
        return True


def admission_of(batch):
    """Room for one batch of groups of eight."""
    return Admission(Pacing(0, fresh_per_step=batch, publish_every=1, group_size=8))


def scheduler_of(workers, admission, groups_per_worker, on_evaluation=print, on_groups=print, on_set_aside=print):
    return RolloutScheduler(
        workers,
        admission,
        groups_per_worker=groups_per_worker,
        instance_seed=lambda index: index,
        next_group=0,
        rollout_version=lambda: None,
        on_groups=on_groups,
        on_evaluation=on_evaluation,
        on_set_aside=on_set_aside,
    )


def test_the_groups_that_the_capacity_rule_leaves_are_spread_over_the_workers():
    workers = FullWorkers(3)
    scheduler = scheduler_of(workers, admission_of(batch=32), groups_per_worker=2)
    scheduler.poll()
    assert workers.calls == [0, 1, 2, 0]


def test_the_driver_looks_through_thousands_of_running_groups_in_no_time():
    groups = 4000
    workers = FullWorkers(1)
    scheduler = scheduler_of(workers, admission_of(batch=8 * groups), groups)
    scheduler.poll()
    assert len(workers.calls) == groups
    started = time.monotonic()
    scheduler.poll()
    assert time.monotonic() - started < 0.1


def test_the_driver_rests_while_no_call_is_in_flight():
    admission = admission_of(batch=8)
    scheduler = scheduler_of(WorkerPool(start=lambda number: None, calls=1, say=print), admission, groups_per_worker=1)
    started = time.monotonic()
    scheduler.poll(wait_s=0.2)
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
        admission_of(batch=8),
        groups_per_worker=64,
        on_evaluation=finished.append,
    )
    plan = EvaluationPlan("id", instances=6, samples=2, seed=0)
    for version in (0, 7):
        scheduler.evaluate(EvaluationJob(plan, version, step=version))
    assert scheduler.evaluates(7)
    while scheduler.evaluating:
        scheduler.poll(train=False)
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


class MortalWorkers(FullWorkers):
    """Workers that answer a call as they are told to, or die with all that they have, several at one moment."""

    def __init__(self, count, answer):
        super().__init__(count)
        self.answer, self.held, self.dying, self.accepted = answer, {}, set(), 0

    def call(self, worker, method, tag, kwargs):
        self.held.setdefault(worker, []).append((tag, kwargs["requests"]))
        return True

    def results(self, wait_s):
        results = []
        for worker, calls in self.held.items():
            if worker not in self.dying:
                results += [self.played(worker, *call) for call in calls]
                calls.clear()
        return results

    def update(self):
        lost, self.dying = sorted(self.dying), set()
        for worker in lost:
            self.held.pop(worker, None)
        return lost

    def counted(self, summary):
        """What the replay buffer adds to a group that it takes."""
        if summary.failure is not None:
            return summary
        self.accepted += 8
        return replace(summary, accepted=self.accepted)

    def played(self, worker, tag, requests):
        summaries = [
            self.counted(self.answer(request)) if tag == "rollout" else self.answer(request) for request in requests
        ]
        size = 2 if tag == "sampled" else 1
        made = [s.request for s in summaries if s.failure is None for _ in range(size)]
        batch = to_record_batch([make_trajectory(f"t{n}", f"g{r.group_index}") for n, r in enumerate(made)])
        answer = summaries if tag == "rollout" else (batch, summaries)
        return SimpleNamespace(ok=True, actor_id=worker, tag=tag, get=lambda: answer)


def failed(request, cause=FailureCause.ENVIRONMENT, reason="no such game"):
    return GroupSummary(request, failure=reason, cause=cause)


class Played:
    """A scheduler over such workers, and what came of it."""

    def __init__(self, workers, groups_per_worker, batch=8 * 52):
        self.groups, self.set_aside, self.evaluations = Counter(), [], []
        self.workers, self.admission = workers, admission_of(batch)
        self.scheduler = scheduler_of(
            workers,
            self.admission,
            groups_per_worker,
            on_groups=lambda summaries: self.groups.update(s.request.group_index for s in summaries),
            on_evaluation=self.evaluations.append,
            on_set_aside=self.set_aside.append,
        )

    def poll(self, times, then=lambda: None):
        for _ in range(times):
            self.scheduler.poll()
            then()


@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_node_is_one_failure_and_what_was_in_flight_is_played_again(times):
    workers = MortalWorkers(13, GroupSummary)
    run = Played(workers, groups_per_worker=4)
    run.scheduler.poll()
    assert run.scheduler.groups_running == 52
    for _ in range(times):
        workers.dying = set(range(13))
        run.scheduler.poll()
        assert run.scheduler.groups_running == 52
    assert run.scheduler.groups_failed == times * 52
    run.scheduler.poll()
    run.scheduler.poll()
    assert run.groups == Counter(range(52))
    assert (run.set_aside, run.admission.running) == ([], 0)


def test_workers_that_die_with_all_they_are_given_end_the_run_soon():
    workers = MortalWorkers(13, GroupSummary)
    run = Played(workers, groups_per_worker=4)
    with pytest.raises(
        UserError, match=r"rollouts failed 10 times in a row, last: a rollout worker was lost \(no reason given\); look"
    ):
        run.poll(20, lambda: setattr(workers, "dying", set(range(13))))


def test_a_group_whose_instance_fails_is_set_aside_and_named_and_the_others_go_on():
    workers = MortalWorkers(2, lambda r: failed(r) if r.group_index % 6 == 5 else GroupSummary(r))
    run = Played(workers, groups_per_worker=2)
    for _ in range(60):
        run.scheduler.poll()
        # The learner takes what there is.
        run.admission.note_learned(run.admission.accepted // (8 * 52))
    assert run.groups.keys() >= {index for index in range(30) if index % 6 != 5}
    assert not [index for index in run.groups if index % 6 == 5]
    aside = run.set_aside[0]
    assert (aside.request.instance_seed, aside.reason, aside.tries, aside.evaluation) == (5, "no such game", 3, None)
    assert run.scheduler.groups_set_aside == len(run.set_aside) >= 5
    assert run.admission.running == 8 * run.scheduler.groups_running


def test_a_group_whose_instance_fails_before_any_other_is_through_ends_no_run():
    slow = MortalWorkers(2, failed)
    # What does not fail is still being played.
    results = slow.results
    slow.results = lambda wait_s: [r for r in results(wait_s) if fails(r)]

    def fails(result):
        return any(summary.request.group_index < 2 for summary in result.get())

    run = Played(slow, groups_per_worker=4)
    for _ in range(20):
        run.scheduler.poll()
    assert [aside.request.group_index for aside in run.set_aside] == [0, 1]
    assert run.scheduler.groups_running == 8


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (FailureCause.SAMPLER, "rollouts failed 10 times in a row, last: no such game; look at the policy server's"),
        (
            FailureCause.ENVIRONMENT,
            "16 groups in a row were set aside and none has finished, last: no such game; look at the environment's",
        ),
    ],
)
def test_a_run_in_which_everything_fails_ends_soon_with_the_reason(cause, said):
    run = Played(MortalWorkers(2, lambda request: failed(request, cause)), groups_per_worker=4)
    with pytest.raises(UserError, match=said):
        run.poll(30)
    assert run.groups.total() == 0


def test_an_evaluation_goes_without_an_instance_that_cannot_be_played():
    workers = MortalWorkers(1, lambda r: failed(r) if r.instance_seed == 102 else GroupSummary(r))
    run = Played(workers, groups_per_worker=1, batch=8)
    run.scheduler.evaluate(EvaluationJob(EvaluationPlan("id", instances=5, samples=2, seed=100), version=3, step=20))
    for _ in range(60):
        run.scheduler.poll(train=False)
    assert not run.scheduler.evaluating
    (evaluation,) = run.evaluations
    assert (len(evaluation.sampled), len(evaluation.greedy)) == (8, 4)
    assert {(aside.request.instance_seed, aside.evaluation.step) for aside in run.set_aside} == {(102, 20)}
    assert len(run.set_aside) == 2


def test_an_instance_that_was_set_aside_is_left_out_of_later_evaluations():
    asked = Counter()

    def answer(request):
        asked[request.instance_seed] += 1
        return failed(request) if request.instance_seed == 102 else GroupSummary(request)

    run = Played(MortalWorkers(1, answer), groups_per_worker=1, batch=8)
    plan = EvaluationPlan("id", instances=5, samples=2, seed=100)
    for step in (20, 40):
        run.scheduler.evaluate(EvaluationJob(plan, version=step, step=step))
        while run.scheduler.evaluating:
            run.scheduler.poll(train=False)
    assert [(len(e.sampled), len(e.greedy)) for e in run.evaluations] == [(8, 4), (8, 4)]
    # Three tries, and one of the greedy half that was handed out before.
    assert asked == {100: 4, 101: 4, 102: 4, 103: 4, 104: 4}
    assert len(run.set_aside) == 2


def test_an_evaluation_of_which_no_instance_is_left_is_over_at_once():
    run = Played(MortalWorkers(1, failed), groups_per_worker=1, batch=8)
    plan = EvaluationPlan("id", instances=2, samples=2, seed=100)
    run.scheduler.evaluate(EvaluationJob(plan, version=1, step=20))
    while run.scheduler.evaluating:
        run.scheduler.poll(train=False)
    run.scheduler.evaluate(EvaluationJob(plan, version=2, step=40))
    assert not run.scheduler.evaluating
    assert [(e.step, e.sampled, e.greedy) for e in run.evaluations] == [(20, [], []), (40, [], [])]


def test_a_demonstrated_instance_that_was_set_aside_does_not_come_again():
    asked = Counter()

    def answer(request):
        asked[request.instance_seed] += 1
        return failed(request) if request.instance_seed == 3 else GroupSummary(request)

    workers = MortalWorkers(1, answer)
    scheduler = RolloutScheduler(
        workers,
        admission_of(batch=8 * 40),
        groups_per_worker=1,
        instance_seed=lambda index: index % 4,
        next_group=0,
        rollout_version=lambda: None,
        on_groups=print,
        on_evaluation=print,
        on_set_aside=print,
    )
    for _ in range(30):
        scheduler.poll()
    assert asked[3] == 3
    assert min(asked[seed] for seed in range(3)) >= 8
