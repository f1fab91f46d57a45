"""What is checked before anything runs, and what is left alone."""

import pytest
from rich.console import Console

from gflowvlm.run.folder_lock import folder_lock
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments.catalog import EXPERIMENTS
from gflowvlm.studies.experiments.results import TABLE
from gflowvlm.studies.experiments.running import run_experiment
from tests.studies.experiments.small_experiment import finish, select


def test_a_model_that_the_user_has_to_make_is_asked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = select(tmp_path / "out", EXPERIMENTS["motivating"], scale="paper", seeds=1)
    with pytest.raises(UserError, match=r"gflowvlm sft --task numbersequence .* --out \S+/models/sequence-7b"):
        run_experiment(chosen, Console(quiet=True), concurrent=1, retries=0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_runs_where_all_is_finished(tmp_path, monkeypatch):
    for trial in select(tmp_path).trials().chosen:
        finish(trial, 0.8)

    def run_trials(*arguments, **settings):
        raise AssertionError("a finished trial was run again")

    monkeypatch.setattr("gflowvlm.studies.experiments.tuning.run_trials", run_trials)
    console = Console(record=True, width=200, quiet=True)
    assert run_experiment(select(tmp_path), console, concurrent=1, retries=0)
    assert (tmp_path / TABLE).exists()


def test_runs_made_with_other_settings_are_not_mixed_with_these(tmp_path):
    for trial in select(tmp_path, only=["sub-tb"], seeds=1).trials().chosen:
        trial.run.prepare()
    other = select(tmp_path, only=["sub-tb"], seeds=1, overrides=["learner.steps=7"])
    with pytest.raises(UserError, match="other settings"):
        run_experiment(other, Console(quiet=True), concurrent=1, retries=0)


def test_an_experiment_goes_on_in_another_folder_than_the_one_where_it_was_begun(tmp_path, monkeypatch):
    for trial in select(tmp_path / "begun", only=["db"], seeds=1).trials().chosen:
        finish(trial, 0.8)
    (tmp_path / "begun").rename(tmp_path / "moved")
    monkeypatch.setattr("gflowvlm.studies.experiments.running.make_warm_start", lambda *arguments: True)
    monkeypatch.setattr(
        "gflowvlm.studies.experiments.tuning.run_trials", lambda trials, *arguments, **settings: ran.extend(trials)
    )
    ran = []
    with pytest.raises(UserError, match="db-1 failed"):
        run_experiment(select(tmp_path / "moved", only=["db"]), Console(quiet=True), concurrent=1, retries=0)
    assert [trial.name for trial in ran] == ["db-1"]


def test_finished_runs_of_other_settings_are_not_passed_over_in_silence(tmp_path):
    for trial in select(tmp_path, only=["sub-tb"], seeds=1).trials().chosen:
        finish(trial, 0.8)
    other = select(tmp_path, only=["sub-tb"], seeds=1, overrides=["learner.steps=7"])
    with pytest.raises(UserError, match="other settings"):
        run_experiment(other, Console(quiet=True), concurrent=1, retries=0)


def test_an_experiment_that_is_running_is_left_alone(tmp_path):
    chosen = select(tmp_path, only=["sub-tb"], seeds=1)
    held = folder_lock(tmp_path, UserError("held"))
    with held, pytest.raises(UserError, match="another `gflowvlm experiment` is running there"):
        run_experiment(chosen, Console(quiet=True), concurrent=1, retries=0)
    assert not chosen.trials().chosen[0].run.folder.root.exists()
