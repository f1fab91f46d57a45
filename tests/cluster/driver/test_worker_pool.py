"""Rollout workers that join, leave, die and find no room, on a real Ray; what they play is made up."""

import os
import signal
import time
from collections import Counter

import pytest
import ray

from gflowvlm.actors.admission import Admission, Pacing
from gflowvlm.cluster.driver import worker_pool
from gflowvlm.cluster.driver.rollout_scheduler import RolloutScheduler
from gflowvlm.cluster.driver.worker_pool import WorkerPool
from gflowvlm.shared.errors import UserError
from tests.actors.local_ray import local_ray

pytestmark = pytest.mark.slow

WAIT_S = 90.0
GROUPS_EACH = 2


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with local_ray(num_cpus=2):
        yield


def player(play_s=0.1, resources=None, breaks=False, max_restarts=3):
    """What starts a worker that takes so long for a group. Made here, so that its process imports next to nothing."""

    class Player:
        def __init__(self, number):
            if breaks:
                raise OSError("no model here")
            self.number = number

        def ping(self):
            return "pong"

        def apply(self, func, *arguments, **keywords):
            return func(self, *arguments, **keywords)

        def sample(self, *, requests, version=None):
            from gflowvlm.actors.groups import GroupSummary

            time.sleep(play_s)
            # No buffer counts here; once all are through, as many are as the largest index says.
            return [
                GroupSummary(r, group_id=f"{r.group_index}", versions=[self.number], accepted=r.group_index + 1)
                for r in requests
            ]

    options = {"resources": resources, "num_cpus": 0, "max_restarts": max_restarts, "max_concurrency": GROUPS_EACH + 1}
    return lambda number: ray.remote(Player).options(**options).remote(number)


class Run:
    """A scheduler, its pool, and the groups that were played."""

    def __init__(self, start, groups=10_000):
        self.played, self.players, self.said = Counter(), Counter(), []
        # As far as this one's workers go, the learner takes all.
        self.admission = Admission(Pacing(0, fresh_per_step=groups, publish_every=1, group_size=1))
        self.pool = WorkerPool(start, calls=GROUPS_EACH, say=self.said.append)
        self.scheduler = RolloutScheduler(
            self.pool,
            self.admission,
            groups_per_worker=GROUPS_EACH,
            instance_seed=lambda index: index,
            next_group=0,
            rollout_version=lambda: None,
            on_groups=self._note,
            on_evaluation=lambda job: None,
            on_set_aside=lambda group: None,
        )

    def _note(self, summaries):
        self.played.update(s.request.group_index for s in summaries)
        self.players.update(s.versions[0] for s in summaries)

    def until(self, condition, what):
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
            self.scheduler.poll(wait_s=0.05)
            running = sum(len(calls) for calls in self.scheduler._running.values())
            assert self.admission.running == running + len(self.scheduler._again)

    def serving(self, count):
        return lambda: len(self.pool.serving) == count and not self.pool.draining

    def play(self, more):
        wanted = self.played.total() + more
        self.until(lambda: self.played.total() >= wanted, f"{more} more groups")

    def end(self):
        while self.scheduler.groups_running > 0:
            self.scheduler.poll(train=False, wait_s=0.05)
        assert self.admission.running == 0
        assert self.admission.accepted == self.played.total()
        assert self.played == Counter(range(self.played.total()))


@pytest.fixture
def runs():
    made = []

    def make(*arguments, **keywords):
        made.append(Run(*arguments, **keywords))
        return made[-1]

    yield make
    for run in made:
        run.pool.close()


def test_workers_join_and_leave_without_a_group_that_fails_or_is_played_twice(runs):
    run = runs(player())
    run.pool.resize(2)
    run.until(run.serving(2), "two workers")
    run.play(4)
    run.pool.resize(8)
    run.until(run.serving(8), "eight workers")
    run.play(32)
    assert len(run.players) == 8
    run.pool.resize(2)
    assert len(run.pool.serving) == 2
    run.until(run.serving(2), "six workers to leave")
    played = Counter(run.players)
    run.play(8)
    assert {number for number in run.players if run.players[number] > played[number]} == {0, 1}
    run.end()
    assert run.scheduler.groups_failed == 0
    assert run.pool.deaths == 0


def test_one_that_was_to_leave_stays_when_more_are_wanted_again(runs):
    run = runs(player(play_s=3.0))
    run.pool.resize(2)
    run.until(lambda: run.scheduler.groups_running == 2 * GROUPS_EACH, "groups")
    run.pool.resize(1)
    run.scheduler.poll()
    assert (len(run.pool.serving), len(run.pool.draining)) == (1, 1)
    run.pool.resize(2)
    assert (len(run.pool.serving), len(run.pool.draining)) == (2, 0)
    run.play(4)
    assert set(run.players) == {0, 1}


def test_a_worker_without_room_on_the_cluster_gets_no_groups_and_can_be_called_off(runs):
    placed, never = player(), player(resources={"a node that never joins": 1})
    run = runs(lambda number: never(number) if number > 0 else placed(number), groups=40)
    run.pool.resize(3)
    run.until(lambda: run.played.total() == 40, "all groups that may be played")
    assert set(run.players) == {0}
    assert len(run.pool.serving) == 1
    run.pool.resize(1)
    assert len(run.pool.serving) == 1
    run.end()


def test_groups_of_a_worker_that_dies_are_played_again_and_it_comes_back(runs):
    run = runs(player())
    run.pool.resize(2)
    run.until(run.serving(2), "two workers")
    pid = ray.get(run.pool._manager.actors()[0].apply.remote(lambda player: os.getpid()), timeout=WAIT_S)
    run.play(4)
    os.kill(pid, signal.SIGKILL)
    run.until(lambda: run.pool.deaths == 1, "the death to be noticed")
    assert run.scheduler.groups_failed > 0
    run.until(run.serving(2), "its return")
    run.play(4)
    run.end()


def test_a_worker_without_work_that_does_not_answer_is_out_of_service_until_it_does(runs, monkeypatch):
    monkeypatch.setattr(worker_pool, "PING_INTERVAL_S", 0.2)
    monkeypatch.setattr(worker_pool, "LATE_PING_S", 2.0)
    run = runs(player(), groups=1)
    run.pool.resize(2)
    run.until(run.serving(2), "two workers")
    run.until(lambda: run.played.total() == 1, "the only group")
    (_, pid) = (ray.get(w.apply.remote(lambda player: os.getpid())) for w in run.pool._manager.actors().values())
    os.kill(pid, signal.SIGSTOP)
    try:
        run.until(run.serving(1), "its silence to be noticed")
    finally:
        os.kill(pid, signal.SIGCONT)
    run.until(run.serving(2), "its return")
    assert run.pool.deaths == 0
    run.end()


def test_a_worker_without_work_that_dies_for_good_is_given_up(runs, monkeypatch):
    monkeypatch.setattr(worker_pool, "PING_INTERVAL_S", 0.2)
    run = runs(player(max_restarts=0), groups=1)
    run.pool.resize(2)
    run.until(run.serving(2), "two workers")
    run.until(lambda: run.played.total() == 1, "the only group")
    ray.kill(run.pool._manager.actors()[1])
    run.until(lambda: run.said, "the worker to be given up")
    assert "a rollout worker does not come back" in run.said[0]
    assert run.pool.deaths == 1
    run.end()


def test_a_worker_that_cannot_start_is_given_up_and_the_last_one_ends_the_run(runs):
    works, breaks = player(), player(breaks=True)
    run = runs(lambda number: breaks(number) if number > 0 else works(number))
    run.pool.resize(2)
    run.until(lambda: run.said, "a worker to be given up")
    assert run.said == ["a rollout worker does not come back (OSError: no model here); 1 are left"]
    run.play(4)
    hopeless = runs(breaks)
    hopeless.pool.resize(1)
    with pytest.raises(UserError, match="no rollout worker is left, last: OSError: no model here"):
        hopeless.until(lambda: False, "the end")
