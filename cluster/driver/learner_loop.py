"""The learner's loop inside a Ray Train worker: pull a batch, take a step, publish, report, checkpoint."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from ray import serve
from ray.train.collective import broadcast_from_rank_zero

from gflowvlm.actors.adapter_store import find_adapter_store, staging_folder
from gflowvlm.actors.admission import Pacing
from gflowvlm.actors.buffer_actor import get_buffer
from gflowvlm.actors.policy_client import PolicyClient
from gflowvlm.actors.policy_server import DEPLOYMENT
from gflowvlm.cluster.driver.actor_calls import ACTOR_TIMEOUT_S, answer_of
from gflowvlm.cluster.driver.gpu_turns import GpuTurns
from gflowvlm.cluster.driver.learner_reports import FATAL, MISMATCH, STARTED, STEP, RemoteMailbox, Reporter
from gflowvlm.evaluation.sampler_check import compare_with_sampler, mismatch_row, require_agreement
from gflowvlm.learner.learner import Learner
from gflowvlm.run.checkpoints import latest_checkpoint, prune_checkpoints
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import BASE_VERSION, Trajectory, from_arrow


class BatchLearner(Protocol):
    """What the loop asks of a learner; see `Learner`."""

    @property
    def steps_taken(self) -> int:
        """Batches taken so far."""

    def step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Takes one step on a batch and returns its metrics."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Returns the log-probability of every response token."""

    def enter_device(self) -> None:
        """Brings the model to its device."""

    def leave_device(self) -> None:
        """Gives the device's memory back for others."""

    def save_adapter(self, directory: Path) -> None:
        """Writes the adapter in PEFT format."""

    def save(self, directory: Path) -> None:
        """Writes a checkpoint."""

    def load(self, directory: Path) -> None:
        """Restores a checkpoint."""


@dataclass(frozen=True)
class LearnerJob:
    """What a learner worker needs to know. Travels as plain values.

    Attributes:
        config: The run's configuration.
        model_path: Model directory or hub name.
        run_dir: The run's folder.
        store_name: Name of the adapter store actor.
        buffer_name: Name of the replay buffer actor.
        server_name: Name of the policy server's Serve application.
        mailbox_name: Name of the actor that takes reports for the driver.
    """

    config: dict[str, Any]
    model_path: str
    run_dir: str
    store_name: str
    buffer_name: str
    server_name: str
    mailbox_name: str


def learner_loop(job_values: dict[str, Any]) -> None:
    """Runs one data-parallel learner to the last step; `job_values` are the fields of a `LearnerJob`.

    A `UserError` ends the loop with a `FATAL` report instead of an exception, so that Ray Train does not restart what
    cannot succeed. Where the driver does not take that either (its disk is full), it says why by itself.
    """
    job = LearnerJob(**job_values)
    folder = RunFolder(Path(job.run_dir))
    context = ray.train.get_context()
    reporter = Reporter(RemoteMailbox.find(job.mailbox_name))
    try:
        config, rank = RunConfig.model_validate(job.config), context.get_world_rank()
        if config.learner.gpus_per_worker > 0 and torch.cuda.is_available():
            # Where none was asked for, Ray hides none either, and names the CPU.
            torch.cuda.set_device(ray.train.torch.get_device())
        turns = GpuTurns.of_run(config, job.server_name)
        try:
            with turns.turn():
                learner = Learner(config, job.model_path, rank=rank, world_size=context.get_world_size())
                loop = LearnerLoop(job, folder, rank, learner, reporter, turns)
                learner.leave_device()
            loop.run()
        finally:
            turns.close()
    except UserError as error:
        try:
            reporter.send(FATAL, {"error": str(error)})
        except (UserError, TimeoutError) as untaken:
            print(error, untaken, sep="\n", file=sys.stderr)


class LearnerLoop:
    """One data-parallel learner's part of a run; see `learner_loop`.

    Args:
        job: What to learn, and from whom.
        folder: The run's folder.
        rank: Number of this learner.
        learner: Takes the steps; restored from the newest checkpoint.
        reporter: Tells the driver what was done.
        turns: Gives it the GPU for as long as it computes, where the sampler is on the same one.
    """

    def __init__(
        self,
        job: LearnerJob,
        folder: RunFolder,
        rank: int,
        learner: BatchLearner,
        reporter: Reporter,
        turns: GpuTurns,
    ) -> None:
        self.config = RunConfig.model_validate(job.config)
        self.pacing = Pacing.of(self.config)
        self.job, self.folder, self.rank, self.learner, self.reporter = job, folder, rank, learner, reporter
        self.turns = turns
        self.store = find_adapter_store(job.store_name)
        self.buffer = get_buffer(job.buffer_name)
        checkpoint = latest_checkpoint(folder.checkpoints)
        if checkpoint is not None:
            self.learner.load(checkpoint)
        self.version = BASE_VERSION

    def run(self) -> None:
        """Learns from the newest checkpoint on to the last step, or until the replay buffer is closed."""
        total = self.config.learner.steps
        first = self.learner.steps_taken
        if first > 0 or self._newest_version() > BASE_VERSION:
            # The samplers must not go on with what a step has left that was undone.
            self._publish(at_start=True)
        if self.rank == 0:
            self.reporter.send(STARTED, {"step": first, "version": self.version, "pid": os.getpid()})
        if first == 0:
            self._check_sampler_agrees()
        batch_ref = self._request_batch(first)
        started = time.monotonic()
        for step in range(first, total):
            asked = time.monotonic()
            batch = self._receive(batch_ref, step)
            if batch is None:
                break
            waited = time.monotonic() - asked
            batch_ref = self._request_batch(step + 1) if step + 1 < total else None
            started = self._take_step(step + 1, batch, started, waited)
        if self.rank == 0 and latest_checkpoint(self.folder.checkpoints, step=self.learner.steps_taken) is None:
            self._checkpoint(self.learner.steps_taken)

    def _request_batch(self, step: int) -> ray.ObjectRef:
        return self.buffer.wait_sample.remote(
            step=step,
            groups=self.config.groups_per_batch,
            version=self.version,
            min_accepted=self.pacing.accepted_before(step),
            timeout_s=self.config.learner.data_timeout_s,
        )

    def _receive(self, reference: ray.ObjectRef, step: int) -> list[Trajectory] | None:
        timeout = self.config.learner.data_timeout_s + ACTOR_TIMEOUT_S
        try:
            batch = ray.get(reference, timeout=timeout)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TimeoutError):
                raise UserError(f"learner step {step + 1}: {error.cause}") from None
            raise error.cause from None
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"learner step {step + 1}: no batch from the replay buffer in {timeout:.0f} s; are rollout workers "
                "alive? (learner.data_timeout_s sets the limit)"
            ) from None
        return None if batch is None else from_arrow(batch)

    def _take_step(self, done: int, batch: list[Trajectory], started: float, waited: float) -> float:
        """Takes, publishes, reports and keeps a step.

        Returns:
            When its time ended: its checkpoint's is the next step's.
        """
        settings = self.config.learner
        ages = [self.version - t.oldest_version for t in batch if not t.expert and t.steps]
        with self.turns.turn(self.learner):
            metrics = self.learner.step(batch)
            published = time.monotonic()
            # What is left at the end is a version too: it is evaluated, and what the run leaves behind.
            if done % settings.publish_every == 0 or done == settings.steps:
                self._publish()
            published_s = time.monotonic() - published
        ended = time.monotonic()
        if self.rank == 0:
            metrics["response_tokens_scored"] = metrics.pop("response_tokens")
            row = {
                "step": done,
                "version": self.version,
                **metrics,
                "staleness_mean": sum(ages) / len(ages) if ages else 0.0,
                "staleness_max": max(ages, default=0),
                "batch_success": sum(t.success for t in batch) / len(batch),
                "wait_s": waited,
                "publish_s": published_s,
                "sampler_sleep_s": self.turns.take_seconds(),
                "step_s": ended - started,
            }
            self.reporter.send(STEP, row)
        if self.rank == 0 and done % self.config.checkpoint_every == 0:
            # Last, because a learner that goes on from it must find the step reported and its adapter published.
            self._checkpoint(done)
        # No `ray.train.report`: it waits until Ray Train's controller looks again, every two seconds.
        return ended

    def _checkpoint(self, done: int) -> None:
        self.learner.save(self.folder.checkpoints / f"step-{done:08d}")
        prune_checkpoints(self.folder.checkpoints, self.config.learner.keep_checkpoints)

    def _newest_version(self) -> int:
        version, _ = answer_of(lambda: self.store.newest.remote(), "the adapter store's newest version")
        return int(version)

    def _publish(self, *, at_start: bool = False) -> None:
        """Publishes the adapter, from one rank; all of them learn its version, with which they ask for batches."""
        if self.rank == 0:
            self._publish_from_here(at_start)
        if ray.train.get_context().get_world_size() > 1:
            self.version = broadcast_from_rank_zero(self.version)

    def _publish_from_here(self, at_start: bool) -> None:
        staging, step = staging_folder(self.folder.root), self.learner.steps_taken
        self.learner.save_adapter(staging)
        keep = self.config.is_evaluated(step, at_start=at_start)
        self.version = answer_of(
            lambda: self.store.publish.remote(str(staging), step, keep=keep), "the adapter store to publish"
        )

    def _check_sampler_agrees(self) -> None:
        if self.rank != 0:
            # A sharded model scores only where all learners do.
            self.learner.score([])
            return
        handle = serve.get_deployment_handle(DEPLOYMENT, self.job.server_name)
        client = PolicyClient.from_config(handle, self.config)
        source = self.turns.on_own_loop(client)
        mismatch = compare_with_sampler(self.config, self.job.model_path, source, self._score)
        self.reporter.send(MISMATCH, mismatch_row(mismatch))
        require_agreement(mismatch, self.config, self.job.model_path)

    def _score(self, trajectories: Sequence[Trajectory]) -> list[list[list[float]]]:
        with self.turns.turn(self.learner):
            return self.learner.score(trajectories)
