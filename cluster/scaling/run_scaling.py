"""Changes the numbers of rollout workers and policy server replicas of a run that runs: when asked, or by load."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from gflowvlm.cluster.launch.local_capacity import LocalCapacity
from gflowvlm.cluster.launch.placement import (
    ROLLOUT,
    SAMPLER,
    Node,
    ResourcePlan,
    as_placed,
    lacking,
    resized,
    resource_plan,
)
from gflowvlm.cluster.scaling.auto_scaling import REPLICAS_KEY, WORKERS_KEY, AutoScaling, Load, Size
from gflowvlm.cluster.scaling.scale_requests import SCALE, Answers, ScaleRequest, take_requests
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import Row
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError

POLL_INTERVAL_S = 1.0
"""How often the run's folder is looked at for requests."""

ON_REQUEST, AUTOMATIC = "request", "automatic"


class Scalable(Protocol):
    """What is scaled; see `RunActors`."""

    def scale_workers(self, workers: int) -> None:
        """Sets the number of rollout workers."""

    def scale_replicas(self, replicas: int) -> None:
        """Sets the number of policy server replicas.

        Raises:
            UserError: The policy server does not take it.
        """


class RunScaling:
    """Keeps a run's size. Every change, and every refused one, is a ``scale`` row of the run's log.

    A run begins with the configured numbers, also when it is resumed: requests are not kept.

    Args:
        folder: The run's folder, where requests appear.
        config: The run's configuration.
        actors: What is scaled.
        nodes: Returns the cluster's nodes.
        say: Called with a line about each change.
        write_row: Appends a row of a kind to the run's log.
        capacity: Measures what this machine has left, for a run on a Ray of its own.

    Attributes:
        size: What the run is set to.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        actors: Scalable,
        nodes: Callable[[], Sequence[Node]],
        say: Callable[[str], None],
        write_row: Callable[[str, Mapping[str, Any]], None],
        capacity: Callable[[], LocalCapacity] = LocalCapacity.now,
    ) -> None:
        self._folder, self._config, self._actors = folder, config, actors
        self._nodes, self._say, self._write_row, self._capacity = nodes, say, write_row, capacity
        self._auto = AutoScaling(config.scaling) if config.scaling.automatic else None
        self._polled_at = 0.0
        self.size = Size(config.rollout.workers, config.sampler.replicas)
        # Left by a command that was killed, for a driver that is gone.
        take_requests(folder)
        self._answers = Answers(folder)

    def answer_requests(self, step: int) -> None:
        """Carries out what `gflowvlm scale` has asked for since; looks once a second.

        Args:
            step: The learner's step, for the log.
        """
        if time.monotonic() - self._polled_at < POLL_INTERVAL_S:
            return
        self._polled_at = time.monotonic()
        self._answers.remove_old()
        for number, request in take_requests(self._folder):
            if isinstance(request, str):
                self._note(step, self.size, ON_REQUEST, number, error=request)
            else:
                self._change(step, self._requested(request), ON_REQUEST, number)

    def observe(self, load: Load, step: int) -> None:
        """Changes the size where the load asks for it and the configuration allows it.

        Args:
            load: What was seen since the last call.
            step: The learner's step, for the log.
        """
        change = None if self._auto is None else self._auto.decide(load, self.size, time.monotonic())
        if change is not None:
            self._change(step, change.size, AUTOMATIC, reason=change.reason)

    def _requested(self, request: ScaleRequest) -> Size:
        workers = self.size.workers if request.workers is None else request.workers
        replicas = self.size.replicas if request.replicas is None else request.replicas
        return Size(workers, replicas)

    def _change(self, step: int, size: Size, cause: str, request: str | None = None, reason: str = "") -> None:
        before = self.size
        if self._auto is not None:
            # Also after a refusal: the same would be wished for again at once.
            self._auto.note_change(time.monotonic())
        try:
            waiting = self._check(size)
            note = self._check_machine(size)
            # First what may fail.
            if size.replicas != before.replicas:
                self._actors.scale_replicas(size.replicas)
            self._actors.scale_workers(size.workers)
        except UserError as error:
            self._note(step, before, cause, request, reason, error=str(error))
        else:
            self.size = size
            self._note(step, before, cause, request, reason, waiting=waiting, note=note)

    def _check(self, size: Size) -> str | None:
        """Returns what the cluster has no room for yet.

        Raises:
            UserError: The size is out of the bounds of automatic scaling, or this machine will never have room.
        """
        scaling = self._config.scaling
        bounds = (
            (WORKERS_KEY, size.workers, scaling.min_workers, scaling.max_workers),
            (REPLICAS_KEY, size.replicas, scaling.min_replicas, scaling.max_replicas),
        )
        for name, wanted, least, most in bounds:
            if scaling.automatic and not least <= wanted <= most:
                raise UserError(f"{name}={wanted}: scaling.automatic keeps this run between {least} and {most}")
        lacks = lacking(self._plan(size), self._nodes())
        if not lacks:
            return None
        missing = "; ".join(lack.describe() for lack in lacks)
        if self._config.cluster.address is None:
            raise UserError(
                f"{size}: this run's own Ray cluster has no room for {missing}; ask for less, or start the run with a "
                "smaller sampler.cpus_per_replica"
            )
        return missing

    def _check_machine(self, size: Size) -> str | None:
        """Returns what to expect of more workers than this machine keeps busy; None also for a run on a cluster.

        Raises:
            UserError: This machine has no memory for them.
        """
        if self._config.cluster.address is not None:
            return None
        return self._capacity().check_workers(size.workers, self.size.workers)

    def _plan(self, size: Size) -> ResourcePlan:
        """Returns what the run asks for at another size; what it runs with has its place before what is new."""
        plan = resource_plan(as_placed(resized(self._config, size.workers, size.replicas)))
        there = {SAMPLER: min(size.replicas, self.size.replicas), ROLLOUT: min(size.workers, self.size.workers)}
        return ResourcePlan(tuple(replace(part, needed=there.get(part.name, part.needed)) for part in plan.parts))

    def _note(
        self,
        step: int,
        before: Size,
        cause: str,
        request: str | None,
        reason: str = "",
        *,
        waiting: str | None = None,
        note: str | None = None,
        error: str | None = None,
    ) -> None:
        row = {
            "step": step,
            "cause": cause,
            "request": request,
            "reason": reason,
            "rollout_workers_before": before.workers,
            "sampler_replicas_before": before.replicas,
            "rollout_workers": self.size.workers,
            "sampler_replicas": self.size.replicas,
            "waiting": waiting,
            "note": note,
            "error": error,
        }
        self._write_row(SCALE, row)
        if request is not None:
            self._answers.give(request, row)
        how = "by itself" if cause == AUTOMATIC else "on request"
        if error is not None:
            self._say(f"not scaled {how}: {error}")
            return
        self._say(f"scaled {how}: {describe(row)}" + (f" ({reason})" if reason else ""))


def describe(row: Row) -> str:
    """Returns a ``scale`` row's change as text, for example ``rollout.workers 2 -> 4, sampler.replicas 1``."""
    parts = []
    for name, key in ((WORKERS_KEY, "rollout_workers"), (REPLICAS_KEY, "sampler_replicas")):
        before, after = row[f"{key}_before"], row[key]
        parts.append(f"{name} {after}" if before == after else f"{name} {before} -> {after}")
    text = ", ".join(parts)
    waiting = None if row["waiting"] is None else f"no room yet for {row['waiting']}"
    return "; ".join(filter(None, (text, waiting, row["note"])))
