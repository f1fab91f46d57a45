"""What a driver makes of its learner's reports and of what it finds in a run's folder; its parts are made up."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from gflowvlm.actors.groups import FailureCause, GroupRequest
from gflowvlm.cluster.driver.learner_reports import STARTED, STEP, Report
from gflowvlm.cluster.driver.rollout_scheduler import EvaluationJob, SetAside
from gflowvlm.cluster.driver.training_run import TrainingRun
from gflowvlm.evaluation.metrics import EvaluationPlan
from gflowvlm.run.log import read_rows
from gflowvlm.run.preset_library import load_preset
from gflowvlm.run.setup import new_run
from gflowvlm.run.state import load_state
from gflowvlm.shared.errors import UserError
from tests.actors.made_trajectories import make_trajectory
from tests.cluster.monitoring.test_telemetry import shown_curve

STEPS = 8


class Scheduler:
    """Takes evaluations and plays none."""

    evaluating = False
    groups_running = groups_failed = groups_set_aside = 0

    def __init__(self):
        self.asked = []

    def evaluates(self, step):
        return step in [job.step for job in self.asked]

    def evaluate(self, job):
        self.asked.append(job)


class Driver(TrainingRun):
    """A driver with what a learner reports, and without a cluster."""

    def __init__(self, folder, config, console):
        super().__init__(folder, config, console)
        self.scheduler, self.number = Scheduler(), 0
        self.waiting = []
        taken = SimpleNamespace(new_reports=lambda: [self.waiting.pop(0) for _ in list(self.waiting)])
        self._actors = SimpleNamespace(reports=taken)
        self.record.draw_curve = lambda: None
        self._restore_curves()
        self._evaluate_what_is_due()

    def report(self, kind, step, version, **content):
        figures = {"loss": 1.0 * version, "wait_s": 0.1, "step_s": 1.0, "staleness_mean": 0.0, "batch_success": 0.5}
        report = Report("a learner", self.number, kind, {"step": step, "version": version, **figures, **content})
        self.number += 1
        self.record.append_report(report)
        self.waiting.append(report)

    def learn(self, first, last, version):
        """Reports steps, each with a version, from the given one on; returns the next."""
        for step in range(first, last + 1):
            self.report(STEP, step, version + step - first)
            self.folder.adapter(version + step - first).mkdir(parents=True, exist_ok=True)
        self._follow_learner()
        return version + last - first + 1

    def asked(self):
        return [(job.step, job.version) for job in self.scheduler.asked]

    def finish_evaluation(self, step, success=1.0):
        job = next(job for job in self.scheduler.asked if job.step == step)
        self.scheduler.asked.remove(job)
        job.sampled = [
            make_trajectory(f"s{step}-{i}", "g0", version=job.version, success=i < 4 * success) for i in range(4)
        ]
        job.greedy = [make_trajectory(f"g{step}", "g0", version=job.version)]
        self._note_evaluation(job)


@pytest.fixture
def run(tmp_path):
    settings = [f"learner.steps={STEPS}", "evaluation.every=2", "evaluation.at_start=false"]
    config = load_preset("numberline-tiny", settings)
    folder = new_run(config, tmp_path / "run")
    said = Console(record=True, width=200, quiet=True)

    def start(step=None):
        """A driver, that finds a checkpoint of that step."""
        if step is not None:
            (folder.checkpoints / f"step-{step:08d}").mkdir(exist_ok=True)
        return Driver(folder, config, said)

    start.folder, start.said = folder, said
    return start


@pytest.mark.parametrize("log_is_there", [True, False])
def test_a_resume_asks_for_the_evaluations_that_are_due_whatever_the_log_says(run, log_is_there):
    first = run()
    first.report(STARTED, 0, 0)
    first.learn(1, 5, version=1)
    assert first.asked() == [(2, 2), (4, 4)]
    first.finish_evaluation(2)
    first.record.note_snapshot({"step": 5}, env_steps=120, response_tokens=900)
    first.telemetry.close()
    if not log_is_there:
        run.folder.metrics.unlink()

    second = run(step=5)
    assert second.asked() == [(4, 4)]
    assert (second._env_steps, second._response_tokens) == (120, 900)
    assert second.state.step == 5
    second.report(STARTED, 5, 6)
    second.learn(6, STEPS, version=7)
    assert second.asked() == [(4, 4), (6, 7), (8, 9)]
    for step in (4, 6, 8):
        second.finish_evaluation(step)
    second.telemetry.close()
    assert load_state(run.folder).evaluated == {2, 4, 6, 8}
    assert load_state(run.folder).due == {}


def test_a_resume_asks_for_an_evaluation_that_was_due_before_the_first_adapter_was_published(run):
    first = run()
    first.report(STARTED, 0, 0)
    first.report(STEP, 1, 0)
    first.report(STEP, 2, 0)
    first._follow_learner()
    assert first.asked() == [(2, 0)]
    first.telemetry.close()
    second = run(step=2)
    second.telemetry.close()
    assert second.asked() == [(2, 0)]


def test_a_lost_best_json_is_made_good_without_the_log_and_a_damaged_one_is_one_line(run):
    first = run()
    first.report(STARTED, 0, 0)
    first.learn(1, 4, version=1)
    for step, success in ((2, 0.75), (4, 0.25)):
        first.finish_evaluation(step, success)
    first.telemetry.close()
    best = json.loads(run.folder.best.read_text())
    assert (best["step"], best["version"]) == (2, 2)

    for damage in ("", "{", "[]", '{"version": null, "success": 1.0}', '{"step": 2}', b"\xff\x00"):
        run.folder.best.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
        with pytest.raises(UserError, match=r"best\.json: damaged .*remove it") as error:
            run(step=4)
        assert "\n" not in str(error.value)
    run.folder.best.unlink()
    run.folder.metrics.unlink()
    second = run(step=4)
    assert second.record.best()["version"] == 2
    second.report(STARTED, 4, 5)
    second.learn(5, 6, version=6)
    second.finish_evaluation(6, 0.5)
    second.telemetry.close()
    assert second.record.best()["version"] == 2


def test_what_an_undone_step_had_due_is_due_with_the_version_of_the_step_that_is_done_again(run):
    first = run()
    first.report(STARTED, 0, 0)
    first.learn(1, 4, version=1)
    first.telemetry.close()
    # The checkpoint of step 4 was not whole.
    second = run(step=3)
    assert second.asked() == [(2, 2)]
    second.report(STARTED, 3, 5)
    second.learn(4, 4, version=6)
    assert second.asked() == [(2, 2), (4, 6)]
    second.telemetry.close()


def test_a_learner_that_goes_back_leaves_each_step_once_in_tensorboard_and_evaluates_none_twice(run):
    driver = run()
    driver.report(STARTED, 0, 0)
    driver.learn(1, 4, version=1)
    driver.finish_evaluation(4)
    driver.report(STARTED, 2, 5)
    # Written down before the driver's loop comes to the start.
    driver.learn(3, 6, version=6)
    driver.telemetry.close()
    assert driver.asked() == [(2, 2), (6, 9)]
    steps = [(1, 1.0), (2, 2.0), (3, 6.0), (4, 7.0), (5, 8.0), (6, 9.0)]
    assert shown_curve(run.folder.tensorboard) == steps
    assert [e[0] for e in shown_curve(run.folder.tensorboard, "evaluation_id/success")] == [4]
    assert [(r["step"], r["version"]) for r in read_rows(run.folder.metrics) if r["kind"] == "step"] == [
        (step, int(loss)) for step, loss in steps
    ]


def test_the_state_is_told_by_reports_and_the_pacing_follows(run):
    driver = run()
    assert (driver.state.step, driver.state.version, driver.state.learning) == (0, 0, False)
    capacity = driver.state.admission.capacity
    driver.report(STARTED, 0, 0)
    driver.learn(1, 3, version=1)
    driver.telemetry.close()
    assert (driver.state.step, driver.state.version, driver.state.learning) == (3, 3, True)
    assert driver.state.admission.capacity == capacity + 3 * driver.config.fresh_per_step


def test_a_group_that_is_set_aside_is_named_on_screen_and_in_the_log(run):
    driver = run()
    driver.display.say = (said := []).append
    job = EvaluationJob(EvaluationPlan.of(driver.config), version=3, step=4)
    for evaluation in (None, job):
        request = GroupRequest(7, instance_seed=12, split="ood")
        driver._note_set_aside(
            SetAside(request, FailureCause.ENVIRONMENT, "game [x] has no walkthrough", 3, evaluation)
        )
    driver.telemetry.close()
    assert said == [
        "training: instance ood/12 failed 3 times and is set aside (game [x] has no walkthrough)",
        "evaluation at step 4: instance ood/12 failed 3 times and is set aside (game [x] has no walkthrough)",
    ]
    rows = [row for row in read_rows(run.folder.metrics) if row["kind"] == "set_aside"]
    assert [(r["instance_seed"], r["reason"], r["tries"], r["evaluation"]) for r in rows] == [
        (12, "game [x] has no walkthrough", 3, None),
        (12, "game [x] has no walkthrough", 3, 4),
    ]


def test_an_evaluation_without_any_instance_that_could_be_played_is_said_and_over(run):
    driver = run()
    driver.display.say = (said := []).append
    driver._note_evaluation(EvaluationJob(EvaluationPlan.of(driver.config), version=3, step=4))
    driver.telemetry.close()
    assert said == ["the evaluation at step 4 has no figures: none of its instances could be played"]
    assert load_state(run.folder).evaluated == {4}
    assert not [row for row in read_rows(run.folder.metrics) if row["kind"] == "evaluation"]
