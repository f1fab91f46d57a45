"""Runs as jobs of a Ray cluster: sending, listing, following and stopping them over the dashboard's address."""

import asyncio
import json
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray.job_submission import JobStatus

from gflowvlm.cluster.launch.installation import installation
from gflowvlm.cluster.launch.job_client import connect, explained, job_address
from gflowvlm.run.packing import pack
from gflowvlm.shared.cluster_settings import ClusterSettings
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import dump_config
from gflowvlm.shared.errors import UserError, one_line

DEFAULT_RUNS = "${GFLOWVLM_RUNS:-$HOME/gflowvlm-runs}"
"""Where runs stand on the cluster, as its shell reads it."""

STOP_WAIT_S = 150
"""How long Ray leaves a stopped driver before it kills it: a learner's step and a checkpoint fit in."""

_JOB_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "COLUMNS": "120"}
STOP_MARGIN_S = 30.0
POLL_S = 1.0
BESIDE_TIMEOUT_S = 180.0
"""How long a command beside a run may take: it starts in ten seconds, or a few more on a busy machine."""

SILENCE_S = 60.0
"""How long a log may be silent before it is asked for anew."""

LOST_TRIES = 10
"""Vain tries in a row to read a log before following it is given up."""

_CONFIG_FILE = "run.yaml"
_RUN, _FOLDER, _PLACEMENT = "gflowvlm_run", "gflowvlm_folder", "gflowvlm_placement"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Job:
    """One job of a run; a run that was resumed has several.

    Attributes:
        id: Ray's submission id.
        run: The run's name.
        status: Ray's status: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED.
        folder: The run's folder where it was named, else empty: it stands in the cluster's folder of runs.
        placement: What places the driver: ``control_resources`` and ``control_node_labels``.
        started: When it was sent, Unix seconds.
        ended: When it ended, Unix seconds; None while it has not.
        ran: Whether its driver ran to its end, so that the log says what happened.
        message: What Ray says about its state.
    """

    id: str
    run: str
    status: str
    folder: str
    placement: dict[str, Any]
    started: float
    ended: float | None
    ran: bool
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return bool(JobStatus(self.status).is_terminal())


class Jobs:
    """The runs among a cluster's jobs.

    Args:
        address: The dashboard's URL; by default that of the environment (``RAY_API_SERVER_ADDRESS``, or
            ``RAY_ADDRESS`` where it is a URL), else the one of a cluster on this machine.

    Attributes:
        address: The dashboard's URL.

    Raises:
        UserError: It cannot be reached, is no Ray dashboard, or refuses the token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = job_address(address)
        self._client = connect(self.address)

    def list(self) -> list[Job]:
        """Returns the jobs of runs, the newest first."""
        with explained(self.address):
            found = [_job(details) for details in self._client.list_jobs() if _RUN in (details.metadata or {})]
        return sorted(found, key=lambda job: -job.started)

    def newest(self, name: str) -> Job:
        """Returns the newest job of a run, or else the one with that submission id.

        Raises:
            UserError: There is none on this cluster.
        """
        jobs = self.list()
        for job in (*(job for job in jobs if job.run == name), *(job for job in jobs if job.id == name)):
            return job
        known = ", ".join(dict.fromkeys(job.run for job in jobs)) or "none"
        raise UserError(f"run {name!r}: not among the jobs of {self.address} (there: {known})")

    def submit(self, name: str, config: RunConfig, folder: str | None, say: Callable[[str], None]) -> Job:
        """Sends a new run.

        Args:
            name: The run's name, and the job's id.
            config: The run's configuration.
            folder: The run's folder on the cluster; None puts it, by its name, into the cluster's folder of runs.
            say: Called with a line about what is sent.

        Raises:
            UserError: The run was sent before, or the cluster does not take it.
        """
        check_name(name)
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
        jobs = self.list()
        before = [job for job in jobs if job.run == name]
        if before:
            raise UserError(_sent_before(before[0]))
        command = f"exec python -m gflowvlm train --config {_CONFIG_FILE} --run {_shell_path(name, folder)}"
        return self._send(_free_id(name, jobs), name, command, folder or "", placement_of(config.cluster), config, say)

    def resume(
        self, name: str, folder: str | None, placement: dict[str, Any] | None, say: Callable[[str], None]
    ) -> Job:
        """Sends a run that is to go on.

        Args:
            name: The run's name.
            folder: Its folder; None takes the one it was sent with, else its name in the cluster's folder of runs.
            placement: What places the driver (`placement_of`); None takes what it was sent with.
            say: Called with a line about what is sent.

        Raises:
            UserError: It is still running, or the cluster does not take it.
        """
        check_name(name)
        jobs = self.list()
        before = [job for job in jobs if job.run == name]
        if before and not before[0].over:
            raise UserError(_sent_before(before[0]))
        if before:
            folder = before[0].folder if folder is None else folder
            placement = before[0].placement if placement is None else placement
        command = f"exec python -m gflowvlm train --resume {_shell_path(name, folder or None)}"
        return self._send(_free_id(name, jobs), name, command, folder or "", placement or {}, None, say)

    def follow(self, job: Job, write: Callable[[str], None], say: Callable[[str], None]) -> Job:
        """Hands on a job's log as it grows, to the job's end; returns the ended job.

        Raises:
            UserError: The cluster could not be reached for a while.
        """
        log, lost = _Log(write), 0
        if job.status == JobStatus.PENDING:
            say("waiting for the cluster to start the driver")
        while True:
            before = log.written
            try:
                if job.status != JobStatus.PENDING:
                    asyncio.run(self._tail(job.id, log))
                job, lost = self._look(job.id), 0
                if job.over:
                    return job
            except (aiohttp.ClientError, OSError, RuntimeError, UserError) as error:
                lost = 1 if log.written > before else lost + 1
                if lost >= LOST_TRIES:
                    reason = one_line(error)
                    raise UserError(
                        f"lost the log of {job.run!r} ({reason}); the run goes on: `gflowvlm logs {job.run}`"
                    ) from None
            time.sleep(POLL_S)

    def stop(self, job: Job) -> Job:
        """Ends a job's driver, which leaves a run that can be resumed, and waits for it; returns the ended job.

        Raises:
            UserError: It did not end in time.
        """
        with explained(self.address):
            self._client.stop_job(job.id)
        return _job(self._ended(job.id, STOP_WAIT_S + STOP_MARGIN_S, repr(job.run)))

    def run_beside(self, job: Job, command: str, arguments: Sequence[str]) -> str:
        """Runs one of this project's commands on the cluster's head, and returns what it printed.

        Not where the run's driver is: what places that driver may be taken by it.

        Args:
            job: The run's job.
            command: The command, such as ``scale``; its first argument is the run's folder there.
            arguments: Its further arguments.

        Raises:
            UserError: The command failed, in its own words, or did not end in time.
        """
        path = _shell_path(job.run, job.folder or None)
        line = f"exec python -m gflowvlm {command} {path} {shlex.join(arguments)}"
        sent = f"{job.run}-{command}-{secrets.token_hex(4)}"
        self._start(sent, line, {}, {}, None, lambda line: None)
        try:
            status = self._ended(sent, BESIDE_TIMEOUT_S, f"`{command}` of {job.run!r}").status
        except UserError:
            with explained(self.address):
                self._client.stop_job(sent)
            raise
        with explained(self.address):
            printed = _own_lines(self._client.get_job_logs(sent))
        if status != JobStatus.SUCCEEDED:
            raise UserError(printed[-1].removeprefix("gflowvlm: ") if printed else f"{job.run}: {command} {status}")
        return "\n".join(printed)

    def _send(
        self,
        job_id: str,
        name: str,
        command: str,
        folder: str,
        placement: dict[str, Any],
        config: RunConfig | None,
        say: Callable[[str], None],
    ) -> Job:
        metadata = {_RUN: name, _FOLDER: folder, _PLACEMENT: json.dumps(placement)}
        self._start(job_id, command, placement, metadata, config, say)
        return self._look(job_id)

    def _start(
        self,
        job_id: str,
        command: str,
        placement: dict[str, Any],
        metadata: dict[str, str],
        config: RunConfig | None,
        say: Callable[[str], None],
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="gflowvlm-submit-") as staged:
            size = pack(installation(), Path(staged))
            if config is not None:
                (Path(staged) / _CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
            say(f"sending {size:.1f} MiB to {self.address}")
            with explained(self.address):
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=job_id,
                    runtime_env={"working_dir": staged, "env_vars": _JOB_ENVIRONMENT},
                    metadata=metadata,
                    entrypoint_resources=placement.get("control_resources") or None,
                    entrypoint_label_selector=placement.get("control_node_labels") or None,
                )

    def _look(self, job_id: str) -> Job:
        return _job(self._details(job_id))

    def _details(self, job_id: str) -> Any:
        with explained(self.address):
            return self._client.get_job_info(job_id)

    def _ended(self, job_id: str, timeout_s: float, what: str) -> Any:
        """Waits for a job's end, and returns what Ray then says of it."""
        deadline = time.monotonic() + timeout_s
        while not JobStatus((details := self._details(job_id)).status).is_terminal():
            if time.monotonic() > deadline:
                raise UserError(f"waited {timeout_s:.0f} s for {what} to stop: {_message(details)}")
            time.sleep(POLL_S)
        return details

    async def _tail(self, job_id: str, log: "_Log") -> None:
        # Ray hands out the log from its beginning each time.
        log.rewind()
        async with aclosing(self._client.tail_job_logs(job_id)) as texts:
            # A connection that was cut without a word looks like a silent log.
            with suppress(TimeoutError, StopAsyncIteration):
                while True:
                    log.add(await asyncio.wait_for(anext(texts), SILENCE_S))


class _Log:
    """A log that is read again from its beginning after a lost connection, and written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._read = write, 0
        self.written = 0

    def rewind(self) -> None:
        self._read = 0

    def add(self, text: str) -> None:
        fresh = text[max(0, self.written - self._read) :]
        self._read += len(text)
        if fresh:
            self.written += len(fresh)
            self._write(fresh)


def check_name(name: str) -> None:
    """Checks a run's name, which is also a folder's.

    Raises:
        UserError: It does not fit.
    """
    if _NAME.fullmatch(name) is None:
        raise UserError(f"run name {name!r}: letters, digits, '.', '_' and '-', at most 63, no '.' or '-' at the ends")


def placement_of(cluster: ClusterSettings) -> dict[str, Any]:
    """Returns the settings that place a submitted driver."""
    return cluster.model_dump(mode="json", include={"control_resources", "control_node_labels"})


def _own_lines(log: str) -> list[str]:
    """Returns the lines of a job's log that its command printed, without Ray's before them."""
    _, _, printed = log.partition("Running entrypoint for job ")
    return [line for line in printed.splitlines()[1:] if line.strip()]


def _free_id(name: str, jobs: Sequence[Job]) -> str:
    taken = {job.id for job in jobs}
    return next(i for i in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if i not in taken)


def _shell_path(name: str, folder: str | None) -> str:
    return f'"{DEFAULT_RUNS}/{name}"' if folder is None else shlex.quote(folder)


def _sent_before(job: Job) -> str:
    if job.over:
        return (
            f"run {job.run!r} was submitted before ({job.status}); go on with `gflowvlm submit --resume {job.run}`, "
            "or choose another --name"
        )
    return (
        f"run {job.run!r} is {job.status} already; follow it with `gflowvlm logs {job.run}`, "
        f"end it with `gflowvlm stop {job.run}`"
    )


def _job(details: Any) -> Job:
    metadata = details.metadata
    return Job(
        id=details.submission_id,
        run=metadata[_RUN],
        status=str(details.status),
        folder=metadata.get(_FOLDER, ""),
        placement=json.loads(metadata.get(_PLACEMENT, "{}")),
        started=(details.start_time or 0) / 1000,
        ended=None if details.end_time is None else details.end_time / 1000,
        ran=details.driver_exit_code is not None,
        message=_message(details),
    )


def _message(details: Any) -> str:
    return " ".join((details.message or "").split())[:300]
