"""How far running trials are, and how long the rest will take."""

from gflowvlm.run.log import append_row
from gflowvlm.studies.experiments.progress import TrialProgress, expected_minutes, minutes_left, minutes_text
from tests.studies.experiments.small_experiment import finish, select


def test_the_time_a_run_takes_is_that_of_the_finished_ones_or_the_presets(tmp_path):
    (trial,) = select(tmp_path, only=["db"], seeds=1).trials().chosen
    assert expected_minutes([], "tiny", 60) == 7.0
    assert expected_minutes([], "tiny", 30) == 3.5
    assert expected_minutes([], "paper", 60) is None
    finish(trial, 0.8)
    assert expected_minutes([trial], "tiny", 60) == 2.0


def test_the_time_left_counts_what_is_done_and_how_many_run_at_a_time():
    assert minutes_left([0.5, 0.0, 0.0], 10.0, 1) == 25.0
    assert minutes_left([0.5, 0.0, 0.0], 10.0, 2) == 12.5
    assert minutes_left([0.5], 10.0, 8) == 5.0
    assert minutes_left([], 10.0, 1) == 0.0
    assert minutes_left([0.5], None, 1) is None
    assert (minutes_text(None), minutes_text(45), minutes_text(150)) == ("unknown", "45 min", "2.5 h")


def test_a_running_trial_is_followed_by_its_log(tmp_path):
    (trial,) = select(tmp_path, only=["db"], seeds=1).trials().chosen
    trial.run.prepare()
    following = TrialProgress(trial)
    following.update()
    assert (following.step, following.success, following.changed) == (0, None, False)
    append_row(trial.run.folder.metrics, "step", {"step": 30})
    append_row(trial.run.folder.metrics, "rollout", {"step": 30, "rollout_success": 0.25})
    following.update()
    assert (following.share, following.success, following.changed) == (0.5, 0.25, True)
    append_row(trial.run.folder.metrics, "learner", {"step": 15})
    append_row(trial.run.folder.metrics, "evaluation", {"step": 15, "success": 0.75})
    append_row(trial.run.folder.metrics, "report", {"step": 15, "version": 0, "success": 0.4})
    following.update()
    assert following.describe() == "db-0  step 15/60  success 0.75"
