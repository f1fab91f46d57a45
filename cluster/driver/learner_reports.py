"""What a learner tells the driver while it learns: reports by call, in order, none lost and none doubled.

The driver owns the run's state (see `RunState`), because it is the one that acts on it and because a run ends with its
driver anyway: an actor that owned it would be one more part that can be behind, or gone. Ray calls only actors, so
reports go through a mailbox, an actor on the driver's node that holds nothing but calls in progress. A report's call
returns once the driver has written it down. Whatever dies before that (mailbox, call, answer), the learner sends the
report again under the same number, and the driver drops what it has. A checkpoint is written after the report of its
step, so every step that a learner can go on from is in the driver's records.
"""

import asyncio
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gflowvlm.actors.adapter_store import NAMESPACE
from gflowvlm.cluster.driver.actor_calls import ACTOR_TIMEOUT_S, PAUSE_S, answer_of
from gflowvlm.shared.errors import UserError

STARTED, STEP, FATAL, MISMATCH = "learner", "step", "fatal", "mismatch"
"""Kinds of reports; they are the kinds of the log's rows too."""

EXCHANGE_S = 1.0
"""How long the driver's call waits in the mailbox for a report."""

REPORT_CALLS = 64
"""Calls that the mailbox takes at a time: each learner has one, the driver another."""

SUPERSEDED = "another learner has taken over this run"


Key = tuple[str, int]
"""A report's process and its number there."""


@dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
        learner: Which learner process it is from; one that is started again is another.
        number: Its number among that process's reports, from 0.
        kind: What it is, for example `STEP`.
        content: Its figures, as JSON can hold them.
    """

    learner: str
    number: int
    kind: str
    content: Mapping[str, Any]

    @property
    def key(self) -> Key:
        """What tells it from all others; the same when it is sent again."""
        return self.learner, self.number


class LearnerMailbox:
    """Where reports wait for the driver. A Ray actor; each report's call waits in it for the driver's answer."""

    def __init__(self) -> None:
        self._waiting: dict[Key, tuple[Report, asyncio.Future[None]]] = {}
        self._arrived = asyncio.Event()

    async def report(self, report: Report) -> None:
        """Hands a report over; returns once the driver has written it down.

        Raises:
            UserError: The driver does not take it; the message says why.
        """
        if report.key not in self._waiting:
            self._waiting[report.key] = report, asyncio.get_running_loop().create_future()
            self._arrived.set()
        # A call that was given up and made again waits for the same answer; so must not cancel it.
        await asyncio.shield(self._waiting[report.key][1])

    async def exchange(self, answers: Mapping[Key, str | None], timeout_s: float) -> list[Report]:
        """Answers reports and returns those that wait, in order of arrival; the driver's call.

        Args:
            answers: By report, None where it is written down, else why it is not taken.
            timeout_s: Longest wait for the first, seconds.
        """
        for key, refusal in answers.items():
            # Unknown ones were lost with an earlier mailbox; they are sent again.
            if key not in self._waiting:
                continue
            _, answer = self._waiting.pop(key)
            if refusal is None:
                answer.set_result(None)
            else:
                answer.set_exception(UserError(refusal))
        self._arrived.clear()
        if not self._waiting:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        return [report for report, _ in self._waiting.values()]


def start_mailbox(name: str) -> Any:
    """Returns the handle of a run's mailbox, a named Ray actor on the driver's node that comes back when it dies."""
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(LearnerMailbox).options(
        name=name,
        namespace=NAMESPACE,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=REPORT_CALLS,
        scheduling_strategy=here,
    )
    return kind.remote()


class Mailbox(Protocol):
    """The two calls of a mailbox, from outside; both return what the method returns, or raise what it raises."""

    def report(self, report: Report) -> None:
        """See `LearnerMailbox.report`."""

    def exchange(self, answers: Mapping[Key, str | None], timeout_s: float) -> list[Report]:
        """See `LearnerMailbox.exchange`."""


class RemoteMailbox:
    """A `Mailbox` that is a Ray actor.

    Args:
        handle: Its handle.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def find(cls, name: str) -> "RemoteMailbox":
        """Returns a running one; raises ValueError when there is none of this name."""
        return cls(ray.get_actor(name, namespace=NAMESPACE))

    def report(self, report: Report) -> None:
        """Hands a report over, again and again while the mailbox is away.

        Raises:
            TimeoutError: The driver did not answer in `ACTOR_TIMEOUT_S`.
            UserError: The driver does not take it.
        """
        answer_of(lambda: self._handle.report.remote(report), "the driver to take the learner's report")

    def exchange(self, answers: Mapping[Key, str | None], timeout_s: float) -> list[Report]:
        """Answers reports and returns those that wait; none while the mailbox is away."""
        try:
            reports: list[Report] = ray.get(
                self._handle.exchange.remote(dict(answers), timeout_s), timeout=timeout_s + ACTOR_TIMEOUT_S
            )
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            time.sleep(PAUSE_S)
            return []
        return reports


@dataclass
class Reporter:
    """A learner process's side: numbers its reports and sends one at a time.

    Attributes:
        mailbox: Where they go.
        learner: Name of this process among all that ever report.
    """

    mailbox: Mailbox
    learner: str = field(default_factory=lambda: secrets.token_hex(8))
    _next: int = 0

    def send(self, kind: str, content: Mapping[str, Any]) -> None:
        """Sends a report; returns once the driver has written it down.

        Raises:
            TimeoutError: It did not in time.
            UserError: It does not take it, for example because its disk is full.
        """
        report = Report(self.learner, self._next, kind, dict(content))
        self._next += 1
        self.mailbox.report(report)


class ReportReceiver:
    """The driver's side: a thread that writes reports down as they come, and keeps them for the driver's loop.

    A thread, because the learner waits for it, and the loop may be drawing a curve.

    Args:
        mailbox: Where they come from.
        append_report: Writes one down; a `UserError` of it is the learner's answer, and `new_reports` raises it.
    """

    def __init__(self, mailbox: Mailbox, append_report: Callable[[Report], None]) -> None:
        self._mailbox, self._append_report = mailbox, append_report
        self._written: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._last: dict[str, int] = {}
        self._learning: str | None = None
        self._superseded: set[str] = set()
        self._refusal: UserError | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="learner reports", daemon=True)

    def start(self) -> None:
        """Begins to receive."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread once it has answered what it has."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=EXCHANGE_S + ACTOR_TIMEOUT_S)

    def new_reports(self) -> list[Report]:
        """Returns the reports that were written down since, in order.

        Raises:
            UserError: One could not be written down.
            RuntimeError: Nothing is received any more, after a defect.
        """
        taken = []
        while not self._written.empty():
            taken.append(self._written.get())
        if not taken and self._refusal is not None:
            raise self._refusal
        if not taken and not self._thread.is_alive():
            raise RuntimeError("the thread that receives the learner's reports has ended")
        return taken

    def _receive(self) -> None:
        answers: dict[Key, str | None] = {}
        while True:
            # What is answered is answered even while closing.
            reports = self._mailbox.exchange(answers, 0.0 if self._closing.is_set() else EXCHANGE_S)
            if self._closing.is_set() and not reports:
                return
            answers = self._answers(reports)

    def _answers(self, reports: Sequence[Report]) -> dict[Key, str | None]:
        return {report.key: self._answer(report) for report in reports}

    def _answer(self, report: Report) -> str | None:
        if report.learner in self._superseded:
            return SUPERSEDED
        if report.number <= self._last.get(report.learner, -1):
            return None
        try:
            self._append_report(report)
        except UserError as refusal:
            self._refusal = refusal
            return str(refusal)
        self._last[report.learner] = report.number
        if report.kind == STARTED:
            if self._learning is not None:
                self._superseded.add(self._learning)
            self._learning = report.learner
        self._written.put(report)
        return None
