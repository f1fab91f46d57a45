"""The driver: puts a run together and keeps it going until the last learner step."""

import json
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import psutil
from rich.console import Console

from gflowvlm.actors.admission import Admission, Pacing
from gflowvlm.actors.demonstration_set import DemonstrationSet
from gflowvlm.actors.groups import GroupSummary
from gflowvlm.cluster.driver.display import RunDisplay, evaluation_lines
from gflowvlm.cluster.driver.learner_reports import FATAL, MISMATCH, STARTED, STEP
from gflowvlm.cluster.driver.rollout_scheduler import (
    EvaluationJob,
    RolloutScheduler,
    SetAside,
    demonstrated_seed,
    training_seed,
)
from gflowvlm.cluster.driver.run_actors import RunActors
from gflowvlm.cluster.driver.run_record import RunRecord
from gflowvlm.cluster.driver.run_state import RunState
from gflowvlm.cluster.driver.token_limits import TokenLimits
from gflowvlm.cluster.driver.worker_pool import last_line
from gflowvlm.cluster.launch.ray_runtime import cluster_nodes
from gflowvlm.cluster.monitoring.memory import MemoryMeter
from gflowvlm.cluster.monitoring.sampler_watch import STATUS_TIMEOUT_S, SamplerLoad, SamplerWatch
from gflowvlm.cluster.monitoring.telemetry import Telemetry
from gflowvlm.cluster.scaling.auto_scaling import Load, Size
from gflowvlm.cluster.scaling.run_scaling import RunScaling
from gflowvlm.evaluation.metrics import REPORT_SEED_OFFSET, EvaluationPlan, evaluate_trajectories
from gflowvlm.evaluation.sampler_check import agreement_line, rounding_line
from gflowvlm.run.checkpoints import latest_checkpoint
from gflowvlm.run.final_report import measured_on, ordered
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import REPORT, Row
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.shell import quoted
from gflowvlm.shared.trajectory import BASE_VERSION

POLL_WAIT_S = 0.1
SNAPSHOT_INTERVAL_S = 5.0
NEWEST_TRAJECTORIES = 128
NEWEST_METRICS = ("rollout_success", "rollout_invalid", "rollout_cut", "rollout_length")
"""Means over the newest trajectories, in the order in which they are noted."""


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
        demonstrations = DemonstrationSet.of_run(config)
        self._demonstrated = None if demonstrations is None else demonstrations.instance_seeds
        self.display = RunDisplay(console, config.learner.steps)
        self.telemetry = Telemetry(folder.tensorboard, folder.root.name)
        self.record = RunRecord(folder, config.evaluation_is_due)
        checkpoint = latest_checkpoint(folder.checkpoints)
        step = int(checkpoint.name.removeprefix("step-")) if checkpoint is not None else 0
        self.state = RunState(Admission(Pacing.of(config), learned=step), step)
        self._newest: deque[list[Any]] = deque(maxlen=NEWEST_TRAJECTORIES)
        self._env_steps = self.record.saved.env_steps
        self._response_tokens = self.record.saved.response_tokens
        self._report_rows: list[Row] = []
        self._tokens_since_start = 0
        self._unexplored = 0
        self._token_limits = TokenLimits(config, self.display.say)
        self._started = time.monotonic()
        self._snapshot_at = 0.0
        self._memory = MemoryMeter()
        # Learner steps since the last look at the load: seconds waited, and in all.
        self._waited: list[tuple[float, float]] = []

    def run(self) -> list[Row]:
        """Runs to the last learner step and the final report; returns the report's rows.

        Raises:
            UserError: The run cannot go on; the message says why.
            KeyboardInterrupt: The run was interrupted; it can be resumed.
        """
        try:
            with self.display, self._make_actors() as self._actors:
                self.display.update(step=self.state.step)
                self._restore_curves()
                self._make_scheduler()
                return self._play_and_learn()
        finally:
            self.telemetry.close()

    def _make_actors(self) -> RunActors:
        return RunActors(self.folder, self.config, self.model_path, self.display.say, self.record.append_report)

    def _restore_curves(self) -> None:
        """Gives TensorBoard what the log has; its own files lack what a killed driver had not written to disk."""
        rows = self.record.rows()
        if rows:
            self.telemetry.rewrite_after(-1, [r for r in rows if r["kind"] != STEP or r["step"] <= self.state.step])

    def _make_scheduler(self) -> None:
        config, stats = self.config, self._actors.buffer_stats()
        self.state.admission.accepted = stats["accepted"]
        self.scheduler = RolloutScheduler(
            self._actors.workers,
            self.state.admission,
            groups_per_worker=config.rollout.groups_per_worker,
            instance_seed=self._instance_seed,
            next_group=0 if stats["largest_group_index"] is None else stats["largest_group_index"] + 1,
            rollout_version=lambda: self.state.version if config.on_policy else None,
            on_groups=self._note_groups,
            on_evaluation=self._note_evaluation,
            on_set_aside=self._note_set_aside,
        )
        # The outer limit is for a loop that is stuck itself.
        self._watch = SamplerWatch(
            lambda: self._actors.loop.run(self._actors.client.status(STATUS_TIMEOUT_S), 5 * STATUS_TIMEOUT_S)
        )
        self.scaling = RunScaling(
            self.folder, config, self._actors, cluster_nodes, self.display.say, self.record.append
        )

    def _instance_seed(self, group_index: int) -> int:
        if self._demonstrated is None:
            return training_seed(self.config.seed, group_index)
        return demonstrated_seed(self.config.seed, group_index, self._demonstrated)

    def _play_and_learn(self) -> list[Row]:
        self._evaluate_what_is_due()
        self._actors.start_learner()
        self._started = time.monotonic()
        while not (self._actors.learner_finished and not self.scheduler.evaluating):
            self.scheduler.poll(train=self._rollouts_wanted(), wait_s=POLL_WAIT_S)
            self._follow_learner()
            self.scaling.answer_requests(self.state.step)
            if time.monotonic() - self._snapshot_at >= SNAPSHOT_INTERVAL_S:
                self._snapshot()
        self._follow_learner()
        if self._actors.learner_error is not None:
            raise UserError(
                f"the learner was given up, its last error: {last_line(str(self._actors.learner_error))}; "
                f"resume with `gflowvlm train --resume {quoted(self.folder.root)}`"
            )
        if self.state.step < self.config.learner.steps:
            raise UserError(
                f"the learner ended at step {self.state.step} of {self.config.learner.steps}; "
                f"resume with `gflowvlm train --resume {quoted(self.folder.root)}`"
            )
        return self._report()

    def _rollouts_wanted(self) -> bool:
        # On-policy rollouts need the version that the learner publishes when it starts.
        ready = self.state.learning or not self.config.on_policy
        return ready and not self._actors.learner_finished

    def _follow_learner(self) -> None:
        for report in self._actors.reports.new_reports():
            content = report.content
            if report.kind == FATAL:
                raise UserError(content["error"])
            if report.kind == STARTED:
                self._note_started(content)
            elif report.kind == MISMATCH:
                self.display.say(agreement_line(content))
                if self.config.policy.load_in is not None:
                    self.display.say(rounding_line(self.config.policy.load_in))
            elif report.kind == STEP:
                self._note_step(content)

    def _note_started(self, report: Mapping[str, Any]) -> None:
        if self.state.note_started(report):
            # The steps that are done again come as reports.
            self.telemetry.rewrite_after(self.state.step, [row for row in self.record.rows() if row["kind"] != STEP])
        self.display.say(f"learner started at step {report['step']}")

    def _note_step(self, report: Mapping[str, Any]) -> None:
        self.state.note_step(report)
        step, version = self.state.step, self.state.version
        self._waited.append((report["wait_s"], report["step_s"]))
        self.display.update(step=step, version=version, staleness=report["staleness_mean"], loss=report["loss"])
        self.telemetry.send("train", report, step)
        if self.config.evaluation_is_due(step):
            self._evaluate_if_new(step, version)

    def _evaluate_what_is_due(self) -> None:
        """Asks for the evaluation at the start, and for those that an interruption kept from being played."""
        if self.config.evaluation.at_start:
            self._evaluate_if_new(step=0, version=BASE_VERSION)
        for step, version in sorted(self.record.saved.due.items()):
            due = step <= self.state.step and self.config.evaluation_is_due(step)
            # The base model has no folder: it is what plays until the first adapter is published.
            if due and (version == BASE_VERSION or self.folder.adapter(version).is_dir()):
                self._evaluate_if_new(step, version)

    def _evaluate_if_new(self, step: int, version: int) -> None:
        # A learner that was started again comes by steps whose evaluation is still being played.
        if step not in self.record.saved.evaluated and not self.scheduler.evaluates(step):
            self.scheduler.evaluate(EvaluationJob(EvaluationPlan.of(self.config), version, step))

    def _note_set_aside(self, group: SetAside) -> None:
        request, evaluation = group.request, group.evaluation
        row = {
            "step": self.state.step,
            "instance_seed": request.instance_seed,
            "split": request.split,
            "evaluation": None if evaluation is None else evaluation.step,
            "cause": group.cause.value,
            "reason": group.reason,
            "tries": group.tries,
        }
        self.record.append("set_aside", row)
        whose = "training" if evaluation is None else f"evaluation at step {evaluation.step}"
        self.display.say(
            f"{whose}: instance {request.split}/{request.instance_seed} failed {group.tries} times and is set aside "
            f"({group.reason})"
        )

    def _note_groups(self, summaries: list[GroupSummary]) -> None:
        for summary in summaries:
            tokens = sum(summary.response_tokens)
            self._env_steps += sum(summary.length)
            self._response_tokens += tokens
            self._tokens_since_start += tokens
            self._token_limits.note(summary.end)
            self._note_unexplored(summary.unexplored)
            invalid = [m + i > 0 for m, i in zip(summary.malformed, summary.inadmissible, strict=True)]
            cut = [end.by_token_limit for end in summary.end]
            rollouts = zip(summary.expert, summary.success, invalid, cut, summary.length, strict=True)
            self._newest.extend(played for expert, *played in rollouts if not expert)

    def _note_unexplored(self, responses: int) -> None:
        if responses > 0 and self._unexplored == 0:
            self.display.say(
                "exploration (rollout.epsilon) leaves some responses as they are: the tokenizer has no tokens that "
                "write another action behind their chain of thought; they count as responses_unexplored"
            )
        self._unexplored += responses

    def _note_evaluation(self, job: EvaluationJob) -> None:
        if not (job.sampled and job.greedy):
            self.display.say(f"the evaluation at step {job.step} has no figures: none of its instances could be played")
            if job.label != REPORT:
                self.record.note_evaluated(job.step)
            return
        figures = evaluate_trajectories(self.config, job.plan, job.version, job.sampled, job.greedy).as_dict()
        row = {"step": job.step, **figures}
        self.record.append(job.label, row, durable=True)
        if job.label == REPORT:
            self._report_rows.append(row)
            return
        self.telemetry.send("evaluation", row, job.step)
        for line in evaluation_lines(row):
            self.display.say(line)
        best = self.record.best()
        if best is None or figures["success"] >= best["success"]:
            self.record.note_best(row)
        # Last: what is not saved as evaluated is played again.
        self.record.note_evaluated(job.step)
        self.record.draw_curve()

    def _snapshot(self) -> None:
        self._snapshot_at = now = time.monotonic()
        newest = list(self._newest)
        values: dict[str, Any] = {
            "env_steps": self._env_steps,
            "response_tokens": self._response_tokens,
            **self._actors.buffer_counts(),
            "groups_running": self.scheduler.groups_running,
            "groups_failed": self.scheduler.groups_failed,
            "groups_set_aside": self.scheduler.groups_set_aside,
            **self._token_limits.counts,
            "responses_unexplored": self._unexplored,
            "worker_restarts": self._actors.workers.deaths,
            "rollout_workers": len(self._actors.workers.serving),
            "rollout_workers_wanted": self.scaling.size.workers,
            "sampler_replicas_wanted": self.scaling.size.replicas,
            "tokens_per_s": self._tokens_since_start / (now - self._started),
        }
        if self.config.cluster.address is None:
            values["memory_gib"] = self._memory.gib()
        samplers = self._watch.look()
        if samplers is not None:
            values |= {"sampler_replicas": samplers.replicas, "sampler_requests": samplers.requests}
            if samplers.idle_share is not None:
                values["sampler_idle_share"] = samplers.idle_share
        if newest:
            means = [sum(column) / len(newest) for column in zip(*newest, strict=True)]
            values |= dict(zip(NEWEST_METRICS, means, strict=True))
        self.record.note_snapshot({"step": self.state.step, **values}, self._env_steps, self._response_tokens)
        self.telemetry.send("rollout", values, self.state.step)
        self.telemetry.repeat()
        self.display.update(
            success=values.get("rollout_success"),
            tokens_per_s=values["tokens_per_s"],
            env_steps=self._env_steps,
            note="evaluating" if self.scheduler.evaluating else "",
        )
        self._observe_load(samplers)

    def _observe_load(self, samplers: SamplerLoad | None) -> None:
        steps, self._waited = self._waited, []
        # An evaluation is no load to scale for, and without a learner step nothing is known of its waiting.
        if self.scheduler.evaluating or not steps or samplers is None or samplers.idle_share is None:
            return
        workers = len(self._actors.workers.serving)
        load = Load(
            learner_waiting=sum(waited for waited, _ in steps) / sum(whole for _, whole in steps),
            sampler_idle=samplers.idle_share,
            requests=samplers.requests,
            requests_capacity=samplers.replicas * self.config.sampler.max_num_seqs,
            groups=self.scheduler.groups_running,
            groups_capacity=workers * self.config.rollout.groups_per_worker,
            serving=Size(workers, samplers.replicas),
        )
        self.scaling.observe(load, self.state.step)

    def _report(self) -> list[Row]:
        best_row = self.record.best()
        best = self.state.version if best_row is None else int(best_row["version"])
        settings = self.config.evaluation
        after = "no adapter (none was better)" if best == BASE_VERSION else f"adapter version {best}"
        self.display.say(f"final report: base model and {after} on {measured_on([self.config.task.name])}")
        for split in ("id", "ood"):
            plan = EvaluationPlan(split, settings.instances, settings.samples, settings.seed + REPORT_SEED_OFFSET)
            for version in (BASE_VERSION, best):
                self.scheduler.evaluate(EvaluationJob(plan, version, self.state.step, label=REPORT))
        while self.scheduler.evaluating:
            self.scheduler.poll(train=False, wait_s=POLL_WAIT_S)
            self.scaling.answer_requests(self.state.step)
        report = ordered(self._report_rows, best)
        summary = {
            "steps": self.state.step,
            "version": best,
            "wall_s": round(time.time() - psutil.Process().create_time(), 1),
            "peak_memory_gib": self._memory.peak_gib if self.config.cluster.address is None else None,
            "report": report,
        }
        write_whole(self.folder.summary, json.dumps(summary, indent=1))
        self.record.draw_curve()
        return report
