"""The rollout workers of a run: starting, in service, draining, dead and coming back."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

from gflowvlm.shared.errors import UserError

PING_PAUSE_S = 1.0
PING_INTERVAL_S = 5.0
"""How often workers in service that have no work are pinged: no call of theirs fails when they die."""
LATE_PING_S = 15.0
"""How long such a ping may take. While Ray looks for room for a dead worker, calls of it wait without an error."""
LAST_PING = 3
"""Vain pings in a row after which a worker is given up. Ray says of a worker that it will restart that it is
unavailable for now, which does not count."""


@dataclass
class _Ping:
    """A ping of a worker in service without work, from when it is due."""

    due: float
    answer: ray.ObjectRef | None = None
    late: float = 0.0


@dataclass(eq=False)
class _Candidate:
    """A worker that is not in service: it starts, restarts, does not answer, or finds no room on the cluster."""

    worker: ray.actor.ActorHandle
    ping: ray.ObjectRef | None = None
    due: float = 0.0
    refused: int = 0


class WorkerPool:
    """Keeps as many rollout workers as wanted, and says which of them may be given work.

    A worker is in service once it has answered a ping: one that waits for room on the cluster holds back no group.
    One that is to leave gets no more calls and is ended when its last one has returned. Ray restarts the dead
    (``rollout.max_restarts``), elsewhere when their node is gone.

    Args:
        start: Starts a worker with a number of its own. Workers are `FaultAwareApply` actors.
        calls: Calls of one kind that a worker may run at the same time.
        say: Called with a line about a worker that is given up.

    Attributes:
        wanted: Workers that there are to be.
        deaths: Workers that died in service.
    """

    def __init__(
        self, start: Callable[[int], ray.actor.ActorHandle], *, calls: int, say: Callable[[str], None]
    ) -> None:
        self._start, self._say = start, say
        self._manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=calls)
        self._candidates: list[_Candidate] = []
        self._draining: set[int] = set()
        self._calls: Counter[int] = Counter()
        self._pings: dict[int, _Ping] = {}
        self._started = 0
        self.wanted = 0
        self.deaths = 0

    @property
    def serving(self) -> list[int]:
        """Ids of the workers that may be given work."""
        return [i for i in self._manager.healthy_actor_ids() if i not in self._draining]

    @property
    def draining(self) -> list[int]:
        """Ids of the workers that are to be ended when their calls have returned."""
        return sorted(self._draining)

    def resize(self, wanted: int) -> None:
        """Starts workers, or chooses some to leave: first those that are not in service, then the youngest."""
        self.wanted = wanted
        staying = [i for i in self._manager.actor_ids() if i not in self._draining]
        missing = wanted - len(staying) - len(self._candidates)
        for back in self.draining[: max(0, missing)]:
            self._draining.discard(back)
            missing -= 1
        for _ in range(missing):
            self._candidates.append(_Candidate(self._start(self._started)))
            self._started += 1
        for _ in range(min(-missing, len(self._candidates))):
            ray.kill(self._candidates.pop().worker)
            missing += 1
        for _ in range(-missing):
            self._draining.add(staying.pop())

    def call(self, worker: int, method: str, tag: str, kwargs: Mapping[str, Any]) -> bool:
        """Calls a worker's method without waiting; returns whether the call was made."""
        sent: int = self._manager.foreach_actor_async(method, tag=tag, kwargs=[dict(kwargs)], remote_actor_ids=[worker])
        self._calls[worker] += sent
        return sent == 1

    def results(self, wait_s: float) -> list[CallResult]:
        """Returns the calls that have ended since, waiting at most so many seconds while any is under way."""
        results = list(self._manager.fetch_ready_async_reqs(timeout_seconds=wait_s))
        self._calls.subtract(result.actor_id for result in results)
        return results

    def update(self) -> list[int]:
        """Takes started workers into service and dead ones out of it; returns the dead ones' ids, whose calls are
        lost.

        Raises:
            UserError: The last worker has been given up.
        """
        self._ping_idle()
        dead = [i for i in self._manager.actor_ids() if not self._manager.is_actor_healthy(i)]
        self.deaths += len(dead)
        for i in dead:
            if i in self._draining:
                self.end(i)
            else:
                self._candidates.append(_Candidate(self._remove(i)))
        self._admit_candidates()
        return dead

    def end(self, worker: int) -> None:
        """Ends a worker."""
        self._draining.discard(worker)
        ray.kill(self._remove(worker))

    def close(self) -> None:
        """Ends all workers."""
        for candidate in self._candidates:
            ray.kill(candidate.worker)
        self._candidates.clear()
        self._draining.clear()
        self._calls.clear()
        self._pings.clear()
        self._manager.clear()

    def _ping_idle(self) -> None:
        """Takes workers without work that do not answer out of service, until they do."""
        now = time.monotonic()
        for worker in self.serving:
            if self._calls[worker] > 0:
                self._pings.pop(worker, None)
            elif worker not in self._pings:
                self._pings[worker] = _Ping(now + PING_INTERVAL_S)
        for worker, ping in [(i, p) for i, p in self._pings.items() if i in self.serving]:
            if ping.answer is None and now >= ping.due:
                ping.answer, ping.late = self._manager.actors()[worker].ping.remote(), now + LATE_PING_S
            elif ping.answer is not None and ray.wait([ping.answer], timeout=0)[0]:
                del self._pings[worker]
                self._note_answer(worker, ping.answer)
            elif ping.answer is not None and now >= ping.late:
                del self._pings[worker]
                self._candidates.append(_Candidate(self._remove(worker), ping.answer))

    def _note_answer(self, worker: int, answer: ray.ObjectRef) -> None:
        try:
            ray.get(answer)
        except RayError:
            self._manager.set_actor_state(worker, healthy=False)

    def _remove(self, worker: int) -> ray.actor.ActorHandle:
        self._calls.pop(worker, None)
        self._pings.pop(worker, None)
        return self._manager.remove_actor(worker)

    def _admit_candidates(self) -> None:
        now = time.monotonic()
        for candidate in self._candidates:
            if candidate.ping is None and now >= candidate.due:
                candidate.ping = candidate.worker.ping.remote()
        pings = [c.ping for c in self._candidates if c.ping is not None]
        if not pings:
            return
        answered = set(ray.wait(pings, num_returns=len(pings), timeout=0)[0])
        for candidate in [c for c in self._candidates if c.ping in answered]:
            try:
                ray.get(candidate.ping)
            except RayError as error:
                candidate.ping, candidate.due = None, now + PING_PAUSE_S
                candidate.refused = 0 if isinstance(error, ActorUnavailableError) else candidate.refused + 1
                if candidate.refused >= LAST_PING:
                    self._give_up(candidate, str(error))
            else:
                self._candidates.remove(candidate)
                self._manager.add_actors([candidate.worker])

    def _give_up(self, candidate: _Candidate, error: str) -> None:
        self._candidates.remove(candidate)
        ray.kill(candidate.worker)
        reason, left = last_line(error), len(self._candidates) + self._manager.num_actors()
        if left == 0:
            raise UserError(
                f"no rollout worker is left, last: {reason}; look at the workers' logs in the Ray dashboard"
            )
        self._say(f"a rollout worker does not come back ({reason}); {left} are left")


def last_line(text: str) -> str:
    """Returns the last line of an error's text: what went wrong, without where."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"
