"""The driver: puts a run together and keeps it going until the last learner step."""

import json
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from actors.adapter_store import start_adapter_store
from actors.admission import Admission
from actors.buffer_actor import create_buffer_actor
from actors.groups import GroupSummary
from actors.policy_client import PolicyClient
from actors.policy_server import deploy_policy_server
from actors.rollout_worker import RolloutWorker, worker_config
from actors.sampling import BASE_VERSION
from cluster.checkpoints import latest_checkpoint
from cluster.evaluation import EvaluationPlan, evaluate_trajectories
from cluster.learner_loop import ACTOR_TIMEOUT_S, LearnerJob, learner_loop
from cluster.models import resolve_model
from cluster.plots import draw_learning_curve
from cluster.progress import RunDisplay
from cluster.rollout_scheduler import EvaluationJob, RolloutScheduler
from cluster.run_log import Row, RowTail, append_row, read_rows
from cluster.telemetry import Telemetry
from shared.config import RunConfig
from shared.errors import UserError
from shared.run_folder import RunFolder

PUMP_WAIT_S = 0.1
SNAPSHOT_INTERVAL_S = 5.0
NEWEST_TRAJECTORIES = 128
STOP_TIMEOUT_S = 60.0

REPORT_SEED_OFFSET = 1_000_000
"""The final report is on other instances than those the best adapter was chosen by."""

REPORT = "report"


class TrainingRun:
    """One run, from its folder to its end. Use inside `ray_cluster`.

    Args:
        folder: The run's folder; what it holds decides where the run goes on.
        config: The run's configuration.
        console: Where progress is shown.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, console: Console) -> None:
        self.folder, self.config, self.console = folder, config, console
        self.model_path = resolve_model(config.policy.model)
        self.display = RunDisplay(console, config.learner.steps)
        self.telemetry = Telemetry(folder.tensorboard, folder.root.name)
        self._rows = read_rows(folder.metrics)
        self._tail = RowTail(folder.metrics, from_end=True)
        checkpoint = latest_checkpoint(folder.checkpoints)
        self.step = int(checkpoint.name.removeprefix("step-")) if checkpoint is not None else 0
        self.version = BASE_VERSION
        self._newest: deque[list[Any]] = deque(maxlen=NEWEST_TRAJECTORIES)
        last = next((r for r in reversed(self._rows) if r["kind"] == "rollout"), {})
        self._env_steps = int(last.get("env_steps", 0))
        self._response_tokens = int(last.get("response_tokens", 0))
        self._tokens_since_start = 0
        self._started = time.monotonic()
        self._snapshot_at = 0.0
        self._learner_error: BaseException | None = None
        self._learner_thread: threading.Thread | None = None
        self._name = f"gflowvlm-{uuid.uuid4().hex[:8]}"

    def run(self) -> list[Row]:
        """Runs to the last learner step and the final report; returns the report's rows.

        Raises:
            UserError: The run cannot go on; the message says why.
            KeyboardInterrupt: The run was interrupted; it can be resumed.
        """
        with self.display:
            self._start_actors()
            try:
                return self._play_and_learn()
            finally:
                self._stop()

    def _start_actors(self) -> None:
        config = self.config
        self.display.say("starting the adapter store, the replay buffer and the policy server")
        # Held, because an actor goes with its last handle.
        self.store = start_adapter_store(f"{self._name}-store", self.folder.root)
        self.buffer = create_buffer_actor(config, self.folder.root, f"{self._name}-buffer")
        started = time.monotonic()
        handle = deploy_policy_server(
            config, self.model_path, store_name=f"{self._name}-store", name=f"{self._name}-policy"
        )
        self.display.say(f"policy server is up ({config.sampler.engine}, {time.monotonic() - started:.0f} s)")
        self.client = PolicyClient.from_config(handle, config)
        stats = ray.get(self.buffer.stats.remote(), timeout=ACTOR_TIMEOUT_S)
        rollout = config.rollout
        worker = ray.remote(RolloutWorker).options(
            num_cpus=rollout.cpus_per_worker,
            max_restarts=rollout.max_restarts,
            # One call a group, one for an evaluation, and a ping.
            max_concurrency=rollout.groups_per_worker + 2,
        )
        workers = [
            worker.remote(
                config=worker_config(config),
                run_config=config,
                model_path=self.model_path,
                source=self.client,
                buffer=self.buffer,
                worker_index=i,
            )
            for i in range(rollout.workers)
        ]
        admission = Admission(
            max_staleness=config.buffer.max_staleness,
            batch=config.fresh_per_step * config.learner.publish_every,
            group_size=config.rollout.group_size,
            version=self.step // config.learner.publish_every,
            accepted=stats["accepted"],
        )
        self.admission = admission
        self.scheduler = RolloutScheduler(
            workers,
            admission,
            groups_per_worker=config.rollout.groups_per_worker,
            run_seed=config.seed,
            next_group=0 if stats["largest_group_index"] is None else stats["largest_group_index"] + 1,
            on_groups=self._note_groups,
            on_evaluation=self._note_evaluation,
        )

    def _play_and_learn(self) -> list[Row]:
        if self.config.evaluation.at_start:
            self._evaluate_if_new(step=0, version=BASE_VERSION)
        self._start_learner()
        self._started = time.monotonic()
        while not (self._learner_finished() and not self.scheduler.evaluating):
            self.scheduler.pump(train=not self._learner_finished(), wait_s=PUMP_WAIT_S)
            self._follow_log()
            self._snapshot()
        self._follow_log()
        if self._learner_error is not None:
            raise UserError(
                f"the learner failed {self.config.learner.max_failures + 1} times, last: "
                f"{_last_line(self._learner_error)}; resume with `gflowvlm train --resume {self.folder.root}`"
            )
        return self._report()

    def _start_learner(self) -> None:
        job = LearnerJob(
            config=self.config.model_dump(mode="json"),
            model_path=self.model_path,
            run_dir=str(self.folder.root),
            store_name=f"{self._name}-store",
            buffer_name=f"{self._name}-buffer",
            server_name=f"{self._name}-policy",
        )
        settings = self.config.learner
        trainer = TorchTrainer(
            learner_loop,
            train_loop_config=vars(job),
            torch_config=TorchConfig(backend="nccl" if settings.gpus_per_worker > 0 else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker},
            ),
            run_config=ray.train.RunConfig(
                name=self._name,
                storage_path=str(self.folder.root / "ray_train"),
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            ),
        )

        def fit() -> None:
            try:
                trainer.fit()
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                self._learner_error = error

        self._learner_thread = threading.Thread(target=fit, name="learner", daemon=True)
        self._learner_thread.start()

    def _learner_finished(self) -> bool:
        return self._learner_thread is not None and not self._learner_thread.is_alive()

    def _follow_log(self) -> None:
        for row in self._tail.new_rows():
            self._rows.append(row)
            if row["kind"] == "fatal":
                raise UserError(row["error"])
            if row["kind"] == "learner":
                self.step = row["step"]
                self.display.say(f"learner started at step {row['step']}")
            elif row["kind"] == "mismatch":
                self.display.say(f"sampler and learner agree to {row['max']:.1e} nats on {row['tokens']} tokens")
            elif row["kind"] == "step":
                self._note_step(row)

    def _note_step(self, row: Row) -> None:
        self.step, self.version = row["step"], row["version"]
        self.admission.advance(max(self.admission.version, self.step // self.config.learner.publish_every))
        self.display.update(step=self.step, version=self.version, staleness=row["staleness_mean"], loss=row["loss"])
        self.telemetry.send("train", row, self.step)
        if self.step % self.config.evaluation.every == 0 or self.step == self.config.learner.steps:
            self._evaluate_if_new(self.step, self.version)

    def _evaluate_if_new(self, step: int, version: int) -> None:
        if any(r["kind"] == "evaluation" and r["step"] == step for r in self._rows):
            return
        self.scheduler.evaluate(EvaluationJob(EvaluationPlan.of(self.config), version, step))

    def _note_groups(self, summaries: list[GroupSummary]) -> None:
        for summary in summaries:
            tokens = sum(summary.response_tokens)
            self._env_steps += sum(summary.length)
            self._response_tokens += tokens
            self._tokens_since_start += tokens
            invalid = [m + i > 0 for m, i in zip(summary.malformed, summary.inadmissible, strict=True)]
            rollouts = zip(summary.expert, summary.success, invalid, summary.length, strict=True)
            self._newest.extend(played for expert, *played in rollouts if not expert)

    def _note_evaluation(self, job: EvaluationJob) -> None:
        figures = evaluate_trajectories(self.config, job.plan, job.version, job.sampled, job.greedy).as_dict()
        row = {"step": job.step, **figures}
        append_row(self.folder.metrics, job.label, row)
        if job.label == REPORT:
            return
        self.telemetry.send("evaluation", row, job.step)
        bound = "" if row["success_bound"] is None else f" (perfect sampler {row['success_bound']:.2f})"
        self.display.say(
            f"evaluation at step {job.step}: success {row['success']:.2f}{bound}, greedy {row['success_greedy']:.2f}, "
            f"Div@{row['samples']} {row['div_at_n']:.2f}"
        )
        best = json.loads(self.folder.best.read_text()) if self.folder.best.exists() else None
        if best is None or figures["success"] >= best["success"]:
            partial = self.folder.best.with_suffix(".partial")
            partial.write_text(json.dumps(row, indent=1))
            partial.replace(self.folder.best)
        draw_learning_curve(read_rows(self.folder.metrics), self.folder.learning_curve, self.folder.root.name)

    def _snapshot(self) -> None:
        now = time.monotonic()
        if now - self._snapshot_at < SNAPSHOT_INTERVAL_S:
            return
        self._snapshot_at = now
        newest = list(self._newest)
        values: dict[str, Any] = {
            "env_steps": self._env_steps,
            "response_tokens": self._response_tokens,
            "groups_running": self.scheduler.groups_running,
            "groups_failed": self.scheduler.groups_failed,
            "worker_restarts": self.scheduler.worker_deaths,
            "tokens_per_s": self._tokens_since_start / (now - self._started),
        }
        if newest:
            values["rollout_success"] = sum(success for success, _, _ in newest) / len(newest)
            values["rollout_invalid"] = sum(invalid for _, invalid, _ in newest) / len(newest)
            values["rollout_length"] = sum(length for _, _, length in newest) / len(newest)
        append_row(self.folder.metrics, "rollout", {"step": self.step, **values})
        self.telemetry.send("rollout", values, self.step)
        self.display.update(
            success=values.get("rollout_success"),
            tokens_per_s=values["tokens_per_s"],
            env_steps=self._env_steps,
            note="evaluating" if self.scheduler.evaluating else "",
        )

    def _report(self) -> list[Row]:
        best = json.loads(self.folder.best.read_text())["version"] if self.folder.best.exists() else self.version
        settings = self.config.evaluation
        self.display.say(f"final report: base model and adapter version {best} on instances not seen so far")
        for split in ("id", "ood"):
            plan = EvaluationPlan(split, settings.instances, settings.samples, settings.seed + REPORT_SEED_OFFSET)
            for version in (BASE_VERSION, best):
                self.scheduler.evaluate(EvaluationJob(plan, version, self.step, label=REPORT))
        while self.scheduler.evaluating:
            self.scheduler.pump(train=False, wait_s=PUMP_WAIT_S)
        report = [r for r in self._tail.new_rows() if r["kind"] == REPORT]
        partial = self.folder.summary.with_suffix(".partial")
        partial.write_text(json.dumps({"steps": self.step, "version": best, "report": report}, indent=1))
        partial.replace(self.folder.summary)
        draw_learning_curve(read_rows(self.folder.metrics), self.folder.learning_curve, self.folder.root.name)
        return report

    def _stop(self) -> None:
        if not self._learner_finished() and self._learner_thread is not None:
            self.display.say("stopping: the learner ends its step and writes a checkpoint")
            try:
                ray.get(self.buffer.close.remote(), timeout=STOP_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                self.display.say(f"the replay buffer did not answer ({_last_line(error)})")
            self._learner_thread.join(timeout=STOP_TIMEOUT_S)
        self.scheduler.stop()
        self.telemetry.close()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def has_run_to_the_end(folder: RunFolder) -> bool:
    """Returns whether the run has its final report."""
    return Path(folder.summary).exists()
