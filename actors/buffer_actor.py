"""The replay buffer as a Ray actor that comes back, with its content, when its process dies."""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gflowvlm.actors.adapter_store import NAMESPACE
from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.actors.sampling_record import SamplingRecord
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.config import BufferSettings, RunConfig
from gflowvlm.shared.errors import UserError

START_TIMEOUT_S = 300.0
"""Longest wait for the actor, which reads the run's trajectories at start."""


APPENDS_PER_FILE = 64
"""Most appends that are written together."""

BYTES_PER_FILE = 256 * 2**20
"""Bytes from which on no further append is written together with others."""

RECORD_FILE = ".sampled.json"
"""Beside the Parquet files: which batches were given. Whoever reads the folder as one data set passes over it, as over
all names that begin with a dot."""


@dataclass(frozen=True)
class Acknowledgement:
    """That trajectories are safe.

    Attributes:
        trajectory_ids: Their ids.
        accepted: Trajectories that the buffer has accepted in all, these included (see `ReplayBuffer.accepted`).
    """

    trajectory_ids: list[str]
    accepted: int


class ReplayBufferActor:
    """A `ReplayBuffer` that many workers append to and the learner waits on.

    A damaged folder does not end the actor (it would be restarted for ever): every call reports it.
    """

    def __init__(self, settings: BufferSettings, seed: int, directory: str, name: str) -> None:
        """Opens the buffer of a run.

        Args:
            settings: As for `ReplayBuffer`.
            seed: As for `ReplayBuffer`.
            directory: The folder of its Parquet files.
            name: The actor's name, by which one that comes back knows what it gave before.
        """
        self._problem: UserError | None = None
        self._changed = asyncio.Condition()
        self._appended = _Rate()
        self._sampled = _Rate()
        self._waiting: list[_Append] = []
        self._writing: asyncio.Task[None] | None = None
        # Data-parallel learners ask for the same step one after another and must get the same batch.
        self._drawn: dict[int, pa.RecordBatch] = {}
        self._record = SamplingRecord(Path(directory) / RECORD_FILE, name)
        try:
            self._held = ReplayBuffer(settings, seed, Path(directory))
        except UserError as problem:
            self._problem = problem

    @property
    def _buffer(self) -> ReplayBuffer:
        if self._problem is not None:
            raise self._problem
        return self._held

    async def append(self, batch: pa.RecordBatch) -> Acknowledgement:
        """Adds trajectories, and acknowledges them: they are on disk (see `ReplayBuffer.append`).

        What arrives while a file is written goes into the next one together, because the disk takes as long for
        many groups as for one.
        """
        self._buffer.check(batch)
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((batch, written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        await written
        return Acknowledgement(list(batch["trajectory_id"].to_pylist()), self._buffer.accepted)

    async def _write_waiting(self) -> None:
        while len(self._waiting) > 0:
            # A turn of the event loop: calls that have arrived meanwhile enter their batches.
            await asyncio.sleep(0)
            appends = self._next_appends()
            # Gathered, so that whatever goes wrong reaches those who wait, and the next ones are written.
            (problem,) = await asyncio.gather(self._write([batch for batch, _ in appends]), return_exceptions=True)
            for written in _awaited(appends):
                if problem is None:
                    written.set_result(None)
                else:
                    written.set_exception(problem)
            async with self._changed:
                self._changed.notify_all()

    def _next_appends(self) -> list["_Append"]:
        """Takes the appends that go into the next file, at least one."""
        count = size = 0
        for batch, _ in self._waiting[:APPENDS_PER_FILE]:
            count, size = count + 1, size + batch.nbytes
            if size >= BYTES_PER_FILE:
                break
        appends, self._waiting = self._waiting[:count], self._waiting[count:]
        return appends

    async def _write(self, batches: list[pa.RecordBatch]) -> None:
        started = time.perf_counter()
        self._buffer.append_checked(batches)
        self._appended.add(batches, started)

    async def wait_sample(
        self, step: int, groups: int, version: int, min_accepted: int, timeout_s: float
    ) -> pa.RecordBatch | None:
        """Waits until enough was accepted, then samples whole groups (see `ReplayBuffer.sample`).

        Every request for one step gets the same batch, also after the actor's process died in between.

        Args:
            step: The learner's step; with the seed it fixes the draw.
            groups: Number of groups; fewer are given while there are fewer.
            version: The learner's policy version.
            min_accepted: Policy trajectories that must have been accepted since the run began.
            timeout_s: Longest wait, seconds.

        Returns:
            The batch, or None once the buffer is closed; of a step that one learner has already, the others get
            it still.

        Raises:
            TimeoutError: It took longer; the message says what is missing.
        """
        buffer = self._buffer

        def ready() -> bool:
            given = self._record.closed or self._record.batch(step) is not None
            return given or (buffer.accepted >= min_accepted and buffer.available(version) >= 1)

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(ready)
        except TimeoutError:
            raise TimeoutError(
                f"replay buffer: no batch for step {step} within {timeout_s:g} s: {buffer.accepted} of "
                f"{min_accepted} trajectories accepted, {buffer.available(version)} groups fresh "
                f"enough at version {version}; are rollout workers and the policy server alive?"
            ) from None
        if step not in self._drawn:
            started, given = time.perf_counter(), self._record.batch(step)
            if given is not None:
                batch = buffer.find(given)
            elif self._record.closed:
                return None
            else:
                batch = buffer.sample(step, min(groups, buffer.available(version)), version)
                self._record.note_batch(step, batch["trajectory_id"].to_pylist())
            self._sampled.add([batch], started)
            self._drawn = {s: b for s, b in self._drawn.items() if s == step - 1} | {step: batch}
        return self._drawn[step]

    async def close(self) -> None:
        """Ends all waiting: learners get None instead of a new batch, now and later."""
        async with self._changed:
            try:
                self._record.close()
            finally:
                # Also where the disk is full: the one that is closed is this one, and learners must not wait for it.
                self._changed.notify_all()

    async def stats(self) -> dict[str, Any]:
        """Returns `ReplayBuffer.stats` and the actor's own figures.

        ``pid``; ``append`` and ``sample``, each with ``trajectories``, ``bytes`` and ``seconds`` (the actor's
        time in it since its start) and the rates ``trajectories_per_s`` and ``mb_per_s`` in that time.
        """
        own = {"pid": os.getpid(), "append": self._appended.figures(), "sample": self._sampled.figures()}
        return {**self._buffer.stats(), **own}


_Append = tuple[pa.RecordBatch, "asyncio.Future[None]"]


def _awaited(appends: Sequence[_Append]) -> list[asyncio.Future[None]]:
    """Returns the futures that somebody still waits for."""
    return [written for _, written in appends if not written.done()]


class _Rate:
    """Work done and the time it took."""

    def __init__(self) -> None:
        self._trajectories = 0
        self._bytes = 0
        self._seconds = 0.0

    def add(self, batches: Sequence[pa.RecordBatch], started: float) -> None:
        self._trajectories += sum(batch.num_rows for batch in batches)
        self._bytes += sum(batch.nbytes for batch in batches)
        self._seconds += time.perf_counter() - started

    def figures(self) -> dict[str, float]:
        seconds = self._seconds if self._seconds > 0 else 1.0
        return {
            "trajectories": self._trajectories,
            "bytes": self._bytes,
            "seconds": self._seconds,
            "trajectories_per_s": self._trajectories / seconds,
            "mb_per_s": self._bytes / seconds / 1e6,
        }


def create_buffer_actor(config: RunConfig, run_dir: Path, name: str) -> Any:
    """Starts a run's replay buffer and waits until it has read what the run's folder holds.

    Args:
        config: The run's configuration.
        run_dir: The run's folder, on this node.
        name: Name of the actor, for `get_buffer`.

    Returns:
        The actor's handle. Calls in flight when its process dies are repeated after the restart.

    Raises:
        UserError: The folder's trajectories cannot be read, the name is taken, or the actor did not start
            in time.
    """
    # The files are on this node's disk: elsewhere the buffer would come back empty.
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(ReplayBufferActor).options(
        name=name,
        namespace=NAMESPACE,
        num_cpus=0,
        resources=dict(config.cluster.control_resources),
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    )
    try:
        actor = kind.remote(config.replay, config.seed, str(RunFolder(run_dir.resolve()).trajectories), name)
    except ValueError:
        raise UserError(
            f"replay buffer {name!r}: there is one already on this cluster; wait for that run to end, or stop it"
        ) from None
    try:
        ray.get(actor.stats.remote(), timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise UserError(
            f"replay buffer {name!r}: did not start within {START_TIMEOUT_S:g} s; "
            "is the machine out of memory, or the run's trajectories folder very large?"
        ) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    return actor


def get_buffer(name: str) -> Any:
    """Returns the handle of a run's replay buffer.

    Raises:
        ValueError: No actor of that name is alive.
    """
    return ray.get_actor(name, namespace=NAMESPACE)
