"""Which trials a selection has, and what is left to do of each."""

import pytest
from rich.console import Console

from gflowvlm.evaluation.metrics import REPORT_SEED_OFFSET
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments import trials as trials_module
from gflowvlm.studies.experiments.catalog import EXPERIMENTS
from gflowvlm.studies.experiments.running import run_experiment
from gflowvlm.studies.experiments.trials import missing_part
from tests.studies.experiments.small_experiment import SMALL, finish, select


def test_trials_come_seed_by_seed_each_in_a_folder_of_its_own(tmp_path):
    trials = select(tmp_path).trials().chosen
    assert [trial.name for trial in trials] == ["sub-tb-0", "db-0", "sub-tb-1", "db-1"]
    assert [trial.run.config.seed for trial in trials] == [0, 0, 1, 1]
    assert {trial.run.folder.root.parent for trial in trials} == {tmp_path.resolve()}
    assert trials[0].run.config.objective.loss == "subtb"


def test_settings_of_the_call_come_after_the_variants(tmp_path):
    (trial,) = (
        select(tmp_path, only=["db"], seeds=1, overrides=["learner.steps=3", "objective.loss=tb"]).trials().chosen
    )
    assert (trial.run.config.learner.steps, trial.run.config.objective.loss) == (3, "tb")


def test_only_takes_names_and_slugs_and_says_which_there_are(tmp_path):
    assert {t.variant.name for t in select(tmp_path, only=["DB"]).trials().chosen} == {"DB"}
    assert {t.variant.name for t in select(tmp_path, only=["sub-tb"]).trials().chosen} == {"Sub TB (λ)"}
    with pytest.raises(UserError, match="did you mean 'sub-tb'"):
        select(tmp_path, only=["subtb"]).trials()


def test_a_preset_that_is_not_shipped_yet_is_named_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trials_module, "preset_names", lambda: ["numberline-tiny"])
    experiment = EXPERIMENTS["markovian"]
    chosen = select(tmp_path, experiment, seeds=3).trials()
    assert {trial.variant.task for trial in chosen.chosen} == {"numberline"}
    blackjack, alfworld = chosen.left_out
    assert "'blackjack-tiny' are not shipped yet: 12 trials" in blackjack
    assert "too long for alfworld-tiny (docs/recipe.md): 12 trials" in alfworld
    with pytest.raises(UserError, match="the model and preset 'alfworld-tiny' are not shipped yet"):
        run_experiment(select(tmp_path, EXPERIMENTS["alfworld"]), Console(quiet=True), concurrent=1, retries=0)


def test_a_preset_whose_model_is_not_shipped_yet_is_named(monkeypatch):
    monkeypatch.setattr(trials_module, "shipped_models", list)
    assert missing_part(SMALL.variants[0], "tiny") == (
        "the model 'numberline-tiny' of preset 'numberline-tiny' is not shipped yet"
    )
    # Whoever runs the large ones brings their models.
    assert missing_part(SMALL.variants[0], "paper") is None


def test_a_finished_trial_is_left_alone_and_an_unfinished_one_goes_on_where_it_stood(tmp_path):
    fresh, half = select(tmp_path, only=["db"]).trials().chosen
    assert [command.arguments[0] for command in fresh.commands] == ["train", "eval"]
    finish(fresh, 0.8)
    finish(half, 0.8, evaluated=False)
    assert fresh.finished
    (evaluation,) = half.commands
    said = " ".join(evaluation.arguments)
    settings = half.run.config.evaluation
    assert f"eval {half.run.folder.root} --split id" in said
    assert f"--seed {settings.seed + REPORT_SEED_OFFSET} --temperature 1.5" in said
    assert evaluation.written != evaluation.result
    assert [trial.name for trial in select(tmp_path).finished()] == ["db-0"]
