"""Who plays what: hands groups of rollouts to the workers, within the capacity rule, whatever dies."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from actors.admission import Admission
from actors.groups import GroupRequest, GroupSummary
from cluster.evaluation import EvaluationPlan
from shared.errors import UserError
from shared.trajectory import Trajectory, from_arrow

ROLLOUT, SAMPLED, GREEDY = "rollout", "sampled", "greedy"
PROBE_TIMEOUT_S = 1.0
EVALUATION_CHUNK = 4
"""Instances of an evaluation that a worker plays in one call."""

MAX_GROUP_FAILURES = 20
"""Failures in a row without any finished group after which the run stops."""

_TRAINING_SEEDS = 2**30


def training_seed(run_seed: int, group_index: int) -> int:
    """Returns the instance seed of a run's group, in [2^30, 2^31): evaluations use smaller ones."""
    return _TRAINING_SEEDS + int(np.random.SeedSequence([run_seed, group_index]).generate_state(1)[0]) % _TRAINING_SEEDS


@dataclass
class EvaluationJob:
    """One evaluation while it is played.

    Attributes:
        plan: What is played.
        version: The policy version that plays.
        step: Learner step it belongs to.
        label: Kind of row that its figures become.
        sampled: Trajectories at temperature 1 so far.
        greedy: Greedy trajectories so far.
    """

    plan: EvaluationPlan
    version: int
    step: int
    label: str = "evaluation"
    sampled: list[Trajectory] = field(default_factory=list)
    greedy: list[Trajectory] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all instances have been played, sampled and greedily."""
        wanted = self.plan.instances * self.plan.samples
        return len(self.sampled) >= wanted and len(self.greedy) >= self.plan.instances


@dataclass(frozen=True)
class _Call:
    """One call of a worker, as it can be made again when the worker dies."""

    tag: str
    method: str
    requests: tuple[GroupRequest, ...]
    job: EvaluationJob | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        if self.job is None:
            return {"requests": list(self.requests)}
        sampled = self.tag == SAMPLED
        return {
            "requests": list(self.requests),
            "version": self.job.version,
            "temperature": 1.0 if sampled else 0.0,
            "group_size": self.job.plan.samples if sampled else 1,
        }


class RolloutScheduler:
    """Keeps the rollout workers busy.

    Args:
        workers: Handles of the `RolloutWorker` actors.
        admission: The capacity rule; counts on over a resume.
        groups_per_worker: Training groups in one call.
        run_seed: Seed of the run.
        next_group: Index of the next training group.
        on_groups: Called with the summaries of finished training groups.
        on_evaluation: Called with each finished evaluation.
    """

    def __init__(
        self,
        workers: Sequence[ray.actor.ActorHandle],
        admission: Admission,
        *,
        groups_per_worker: int,
        run_seed: int,
        next_group: int,
        on_groups: Callable[[list[GroupSummary]], None],
        on_evaluation: Callable[[EvaluationJob], None],
    ) -> None:
        self._manager = FaultTolerantActorManager(list(workers), max_remote_requests_in_flight_per_actor=1)
        self._admission = admission
        self._groups_per_worker = groups_per_worker
        self._run_seed = run_seed
        self._next_group = next_group
        self._on_groups, self._on_evaluation = on_groups, on_evaluation
        self._running: dict[tuple[int, str], _Call] = {}
        self._again: deque[_Call] = deque()
        self._evaluations: deque[_Call] = deque()
        self._dead: set[int] = set()
        self._jobs: list[EvaluationJob] = []
        self._failures_in_a_row = 0
        self.groups_failed = 0
        self.worker_deaths = 0
        self.last_failure = ""

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation has been asked for and is not finished."""
        return len(self._jobs) > 0

    @property
    def groups_running(self) -> int:
        """Training groups being played."""
        return self._admission.running // self._admission.group_size

    def evaluate(self, job: EvaluationJob) -> None:
        """Queues an evaluation; it is played beside the training groups."""
        self._jobs.append(job)
        seeds = list(job.plan.seeds)
        for tag in (SAMPLED, GREEDY):
            size = EVALUATION_CHUNK if tag == SAMPLED else EVALUATION_CHUNK * job.plan.samples
            for start in range(0, len(seeds), size):
                requests = tuple(
                    GroupRequest(group_index=i, instance_seed=seed, split=job.plan.split)
                    for i, seed in enumerate(seeds[start : start + size])
                )
                self._evaluations.append(_Call(tag, "rollout", requests, job))

    def pump(self, *, train: bool = True, wait_s: float = 0.0) -> None:
        """Collects what is ready, revives workers, and hands out new work.

        Args:
            train: Whether to start new training groups.
            wait_s: How long to wait for results, seconds.

        Raises:
            UserError: Groups fail again and again without any that finishes.
        """
        for result in self._manager.fetch_ready_async_reqs(timeout_seconds=wait_s):
            call = self._running.pop((result.actor_id, result.tag), None)
            if call is None:
                continue
            if result.ok:
                self._collect(call, result.get())
            else:
                self._note_failure(call, str(result.get()))
        self._recover_lost_calls()
        self._dispatch(train)

    def stop(self) -> None:
        """Ends the workers."""
        self._manager.clear()

    def _collect(self, call: _Call, result: Any) -> None:
        if call.job is None:
            self._collect_groups(call, result)
            return
        (call.job.sampled if call.tag == SAMPLED else call.job.greedy).extend(from_arrow(result))
        if call.job.finished and call.job in self._jobs:
            self._jobs.remove(call.job)
            self._on_evaluation(call.job)

    def _collect_groups(self, call: _Call, summaries: list[GroupSummary]) -> None:
        finished = [s for s in summaries if s.failure is None]
        failed = {s.request.group_index: s.failure for s in summaries if s.failure is not None}
        refused = next((s.failure for s in summaries if s.refused), None)
        if refused is not None:
            raise UserError(refused)
        if finished:
            self._failures_in_a_row = 0
            self._admission.note_accepted(len(finished))
            self._on_groups(finished)
        if failed:
            lost = tuple(r for r in call.requests if r.group_index in failed)
            self._note_failure(_Call(call.tag, call.method, lost), next(iter(failed.values())))

    def _note_failure(self, call: _Call, reason: str) -> None:
        self.last_failure = reason.strip().splitlines()[-1] if reason.strip() else "unknown"
        self._failures_in_a_row += 1
        self.groups_failed += len(call.requests)
        self._requeue(call)
        if self._failures_in_a_row > MAX_GROUP_FAILURES:
            raise UserError(
                f"rollouts failed {self._failures_in_a_row} times in a row, last: {self.last_failure}; "
                "look at the policy server and worker logs in the Ray dashboard"
            )

    def _requeue(self, call: _Call) -> None:
        if call.job is None:
            self._again.append(call)
        else:
            self._evaluations.appendleft(call)

    def _recover_lost_calls(self) -> None:
        # A call whose actor was found dead disappears from the manager without a result.
        dead = {i for i in self._manager.actor_ids() if not self._manager.is_actor_healthy(i)}
        self.worker_deaths += len(dead - self._dead)
        self._dead = dead
        for key in [k for k in self._running if k[0] in dead]:
            self._note_failure(self._running.pop(key), "the rollout worker died")
        if dead:
            self._manager.probe_unhealthy_actors(timeout_seconds=PROBE_TIMEOUT_S, mark_healthy=True)

    def _dispatch(self, train: bool) -> None:
        for actor_id in self._manager.healthy_actor_ids():
            if train and (actor_id, ROLLOUT) not in self._running:
                self._send(actor_id, self._next_rollout())
            if self._evaluations and not any((actor_id, tag) in self._running for tag in (SAMPLED, GREEDY)):
                self._send(actor_id, self._evaluations.popleft())

    def _next_rollout(self) -> _Call | None:
        if self._again:
            return self._again.popleft()
        groups = self._admission.admit(self._groups_per_worker)
        if groups == 0:
            return None
        indices = range(self._next_group, self._next_group + groups)
        self._next_group += groups
        requests = (GroupRequest(i, training_seed(self._run_seed, i), "id") for i in indices)
        return _Call(ROLLOUT, "sample", tuple(requests))

    def _send(self, actor_id: int, call: _Call | None) -> None:
        if call is None:
            return
        sent = self._manager.foreach_actor_async(
            call.method, tag=call.tag, kwargs=[call.kwargs], remote_actor_ids=[actor_id]
        )
        if sent == 1:
            self._running[(actor_id, call.tag)] = call
        else:
            self._requeue(call)
