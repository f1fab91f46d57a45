"""Who plays what: hands groups of rollouts to the workers, within the capacity rule, whatever dies."""

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gflowvlm.actors.admission import Admission
from gflowvlm.actors.groups import FailureCause, GroupRequest, GroupSummary
from gflowvlm.cluster.driver.group_failures import GroupFailures
from gflowvlm.cluster.driver.worker_pool import WorkerPool, last_line
from gflowvlm.evaluation.metrics import EvaluationPlan
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.instances import TRAINING_SEEDS
from gflowvlm.shared.trajectory import Trajectory, from_arrow

ROLLOUT, SAMPLED, GREEDY = "rollout", "sampled", "greedy"
EVALUATION_CHUNK = 4
"""Instances of an evaluation that a worker plays in one call."""

MAX_PASSED_OVER = 1000
"""Instances in a row that are passed over because they were set aside, before one of them is tried again after all."""


def training_seed(run_seed: int, group_index: int) -> int:
    """Returns the instance seed of a run's group, one of `TRAINING_SEEDS`."""
    drawn = int(np.random.SeedSequence([run_seed, group_index]).generate_state(1)[0])
    return TRAINING_SEEDS[drawn % len(TRAINING_SEEDS)]


def demonstrated_seed(run_seed: int, group_index: int, instance_seeds: Sequence[int]) -> int:
    """Returns which demonstrated instance a run's group plays: each once, in any order, before one comes again."""
    repetition, place = divmod(group_index, len(instance_seeds))
    order = np.random.default_rng([run_seed, repetition]).permutation(len(instance_seeds))
    return instance_seeds[int(order[place])]


@dataclass
class EvaluationJob:
    """One evaluation while it is played.

    Attributes:
        plan: What is played.
        version: The policy version that plays.
        step: Learner step it belongs to.
        label: Kind of row that its figures become.
        sampled: Trajectories at the plan's temperature so far.
        greedy: Greedy trajectories so far.
        set_aside: How many instances' sampled and how many instances' greedy trajectories it goes without, by tag.
    """

    plan: EvaluationPlan
    version: int
    step: int
    label: str = "evaluation"
    sampled: list[Trajectory] = field(default_factory=list)
    greedy: list[Trajectory] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)

    @property
    def finished(self) -> bool:
        """Whether all instances that were not set aside have been played, sampled and greedily."""
        sampled = (self.plan.instances - self.set_aside[SAMPLED]) * self.plan.samples
        greedy = self.plan.instances - self.set_aside[GREEDY]
        return len(self.sampled) >= sampled and len(self.greedy) >= greedy

    def played(self, tag: str, trajectories: Sequence[Trajectory]) -> None:
        """Takes trajectories that were sampled, or greedily played, as the tag says."""
        (self.sampled if tag == SAMPLED else self.greedy).extend(trajectories)


@dataclass(frozen=True)
class SetAside:
    """A group that is not played any more.

    Attributes:
        request: What was asked for.
        cause: Why it failed the last time.
        reason: The same in words.
        tries: How often it was played.
        evaluation: The evaluation that it belonged to; None for a training group, another of which takes its place.
    """

    request: GroupRequest
    cause: FailureCause
    reason: str
    tries: int
    evaluation: EvaluationJob | None


@dataclass(frozen=True)
class _Call:
    """One call of a worker, as it can be made again when the worker dies."""

    tag: str
    method: str
    requests: tuple[GroupRequest, ...]
    job: EvaluationJob | None = None
    version: int | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        if self.job is None:
            return {"requests": list(self.requests), "version": self.version}
        sampled = self.tag == SAMPLED
        return {
            "requests": list(self.requests),
            "version": self.job.version,
            "temperature": self.job.plan.temperature if sampled else 0.0,
            "group_size": self.job.plan.samples if sampled else 1,
        }


class RolloutScheduler:
    """Keeps the rollout workers busy.

    Args:
        workers: The rollout workers; their number may change at any time.
        admission: The capacity rule; counts on over a resume.
        groups_per_worker: Training groups that one worker plays at the same time.
        instance_seed: Gives the instance that a training group plays, by the group's index.
        next_group: Index of the next training group.
        rollout_version: Gives the policy version that must play a training group that starts now; its None
            leaves every response to the newest.
        on_groups: Called with the summaries of finished training groups.
        on_evaluation: Called with each finished evaluation.
        on_set_aside: Called with each group that is given up, because it fails again and again while others do not.
    """

    def __init__(
        self,
        workers: WorkerPool,
        admission: Admission,
        *,
        groups_per_worker: int,
        instance_seed: Callable[[int], int],
        next_group: int,
        rollout_version: Callable[[], int | None],
        on_groups: Callable[[list[GroupSummary]], None],
        on_evaluation: Callable[[EvaluationJob], None],
        on_set_aside: Callable[[SetAside], None],
    ) -> None:
        self._workers = workers
        self._admission = admission
        self._groups_per_worker = groups_per_worker
        self._instance_seed = instance_seed
        self._next_group = next_group
        self._rollout_version = rollout_version
        self._on_groups, self._on_evaluation, self._on_set_aside = on_groups, on_evaluation, on_set_aside
        self._running: dict[int, list[_Call]] = {}
        self._again: deque[_Call] = deque()
        self._evaluations: deque[_Call] = deque()
        self._jobs: list[EvaluationJob] = []
        self._evaluated_groups = itertools.count()
        self._failures = GroupFailures()
        self.groups_failed = 0

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation has been asked for and is not finished."""
        return len(self._jobs) > 0

    @property
    def groups_running(self) -> int:
        """Training groups being played."""
        return self._admission.groups_running

    @property
    def groups_set_aside(self) -> int:
        """Groups, those of evaluations included, that are not played any more."""
        return self._failures.set_aside

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation of a learner step has been asked for and is not finished."""
        return any(job.step == step for job in self._jobs)

    def evaluate(self, job: EvaluationJob) -> None:
        """Queues an evaluation; it is played beside the training groups, without the instances that were set aside."""
        self._jobs.append(job)
        seeds = [s for s in job.plan.seeds if not self._failures.is_broken(GroupRequest(0, s, job.plan.split))]
        job.set_aside.update(dict.fromkeys((SAMPLED, GREEDY), job.plan.instances - len(seeds)))
        for tag in (SAMPLED, GREEDY):
            size = EVALUATION_CHUNK if tag == SAMPLED else EVALUATION_CHUNK * job.plan.samples
            for start in range(0, len(seeds), size):
                # Calls are told apart by their requests, and evaluations play the same instances again and again.
                requests = tuple(
                    GroupRequest(next(self._evaluated_groups), instance_seed=seed, split=job.plan.split)
                    for seed in seeds[start : start + size]
                )
                self._evaluations.append(_Call(tag, "rollout", requests, job))
        # Where none of its instances is left to be played.
        self._finish_evaluation(job)

    def poll(self, *, train: bool = True, wait_s: float = 0.0) -> None:
        """Collects what is ready, looks after the workers, and hands out new work.

        Args:
            train: Whether to start new training groups.
            wait_s: How long to wait for results, seconds.

        Raises:
            UserError: Groups fail again and again without any that finishes, or no worker is left.
        """
        if not any(self._running.values()):
            # Without a call in flight the manager would not wait at all, and the driver would spin.
            time.sleep(wait_s)
        errors: dict[int, str] = {}
        for result in self._workers.results(wait_s):
            if result.ok:
                self._collect(result.actor_id, result.tag, result.get())
            else:
                errors[result.actor_id] = last_line(str(result.get()))
        self._recover_lost_calls(errors)
        self._end_drained()
        self._dispatch(train)

    def _collect(self, actor_id: int, tag: str, result: Any) -> None:
        summaries: list[GroupSummary] = result if tag == ROLLOUT else result[1]
        requests = tuple(summary.request for summary in summaries)
        running = self._running.get(actor_id, [])
        call = next((c for c in running if (c.tag, c.requests) == (tag, requests)), None)
        if call is None:
            return
        running.remove(call)
        refused = next((s.failure for s in summaries if s.permanent), None)
        if refused is not None:
            raise UserError(refused)
        finished = [s for s in summaries if s.failure is None]
        for summary in finished:
            self._failures.note_finished((tag, summary.request))
        if call.job is not None:
            call.job.played(tag, from_arrow(result[0]))
        elif finished:
            self._admission.note_accepted(len(finished), max(summary.accepted for summary in finished))
            self._on_groups(finished)
        failed = [(s.request, s.cause, last_line(s.failure)) for s in summaries if s.failure is not None]
        again = [
            request
            for request, cause, reason in failed
            if self._is_played_again(call, request, cause or FailureCause.LOST, reason)
        ]
        if again:
            self._requeue(replace(call, requests=tuple(again)))
        if call.job is not None:
            self._finish_evaluation(call.job)

    def _finish_evaluation(self, job: EvaluationJob) -> None:
        if job.finished and job in self._jobs:
            self._jobs.remove(job)
            self._on_evaluation(job)

    def _is_played_again(self, call: _Call, request: GroupRequest, cause: FailureCause, reason: str) -> bool:
        """Counts a failure; returns whether the group is to be played again, else it is set aside."""
        self.groups_failed += 1
        group = (call.tag, request)
        tries = self._failures.tries(group) + 1
        at_a_time = self._groups_per_worker * max(1, self._workers.wanted)
        if not self._failures.note_failed(group, request, cause, reason, at_a_time):
            return True
        if call.job is None:
            self._admission.note_failed()
        else:
            call.job.set_aside[call.tag] += 1
        self._on_set_aside(SetAside(request, cause, reason, tries, call.job))
        return False

    def _requeue(self, call: _Call) -> None:
        if call.job is None:
            self._again.append(call)
        else:
            self._evaluations.appendleft(call)

    def _recover_lost_calls(self, errors: Mapping[int, str]) -> None:
        """Has what lost workers were playing played again; `errors` are what their calls ended with, by worker."""
        # A call whose actor was found dead disappears from the manager without a result.
        for actor_id in self._workers.update():
            reason = f"a rollout worker was lost ({errors.get(actor_id, 'no reason given')})"
            for call in self._running.pop(actor_id, []):
                again = [r for r in call.requests if self._is_played_again(call, r, FailureCause.LOST, reason)]
                if again:
                    self._requeue(replace(call, requests=tuple(again)))
                if call.job is not None:
                    self._finish_evaluation(call.job)

    def _end_drained(self) -> None:
        for actor_id in self._workers.draining:
            if not self._running.get(actor_id):
                self._running.pop(actor_id, None)
                self._workers.end(actor_id)

    def _dispatch(self, train: bool) -> None:
        if train:
            self._start_groups()
        for actor_id in self._workers.serving:
            tags = self._tags(actor_id)
            rollouts = tags.count(ROLLOUT)
            calls = 1 if train else idle_worker_calls(self._groups_per_worker, rollouts)
            for _ in range(min(calls - (len(tags) - rollouts), len(self._evaluations))):
                self._send(actor_id, self._evaluations.popleft())

    def _start_groups(self) -> None:
        # Counted once: thousands of groups may be running, and this is done ten times a second.
        playing = {actor_id: self._tags(actor_id).count(ROLLOUT) for actor_id in self._workers.serving}
        # One after the other gets a group, so that the few that the capacity rule may leave are spread.
        for groups in range(min(playing.values(), default=0), self._groups_per_worker):
            for actor_id in playing:
                if playing[actor_id] == groups:
                    call = self._next_rollout()
                    if call is None:
                        return
                    playing[actor_id] += self._send(actor_id, call)

    def _tags(self, actor_id: int) -> list[str]:
        return [call.tag for call in self._running.get(actor_id, [])]

    def _next_rollout(self) -> _Call | None:
        version = self._rollout_version()
        if self._again:
            return replace(self._again.popleft(), version=version)
        if self._admission.admit(1) == 0:
            return None
        return _Call(ROLLOUT, "sample", (self._next_request(),), version=version)

    def _next_request(self) -> GroupRequest:
        """Returns the next training group; a demonstrated instance that was set aside does not come again."""
        for _ in range(MAX_PASSED_OVER):
            index, self._next_group = self._next_group, self._next_group + 1
            request = GroupRequest(index, self._instance_seed(index), "id")
            if not self._failures.is_broken(request):
                break
        return request

    def _send(self, actor_id: int, call: _Call) -> bool:
        taken = self._workers.call(actor_id, call.method, call.tag, call.kwargs)
        if taken:
            self._running.setdefault(actor_id, []).append(call)
        else:
            self._requeue(call)
        return taken


def idle_worker_calls(groups_per_worker: int, rollouts: int) -> int:
    """Returns how many evaluation calls a worker that starts no more training groups may run at the same time.

    A call plays `EVALUATION_CHUNK` groups and ends with its longest episode, so there are twice as many calls
    as fill the worker: the next ones run while the last episodes of the others end. At least one.
    """
    return max(1, 2 * (groups_per_worker - rollouts) // EVALUATION_CHUNK)
