"""The shipped experiments: every variant is a run that can be made, with the paper's figures beside it."""

import json
from pathlib import Path

import pytest

from gflowvlm.run.models import resolve_model
from gflowvlm.run.preset_library import load_preset, preset_names
from gflowvlm.studies.experiments.catalog import EXPERIMENTS
from gflowvlm.studies.experiments.description import SCALES
from gflowvlm.studies.experiments.trials import missing_part
from tests.studies.experiments.small_experiment import select


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_variant_of_a_shipped_preset_resolves_to_a_configuration(experiment, scale, tmp_path):
    chosen = select(tmp_path, experiment, scale=scale, seeds=1)
    shipped = [v for v in experiment.variants if v.preset(scale) in preset_names() and missing_part(v, scale) is None]
    trials = chosen.trials().chosen
    assert [trial.variant for trial in trials] == shipped
    if scale == "paper":
        assert len(shipped) == len(experiment.variants)
    for trial in trials:
        assert trial.run.config.task.name == trial.variant.task
        assert not trial.run.config.cluster.dashboard


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_variants_of_a_shipped_preset_are_all_different_runs(experiment, scale, tmp_path):
    configs = [trial.run.config for trial in select(tmp_path, experiment, scale=scale, seeds=1).trials().chosen]
    assert len({repr(config) for config in configs}) == len(configs)


@pytest.mark.parametrize("name", ["alfworld", "markovian"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_markovian_variant_has_no_past_in_its_prompts_and_a_tiny_policy_has_learned_its_kind(name, scale, tmp_path):
    for trial in select(tmp_path, EXPERIMENTS[name], scale=scale, seeds=1).trials().chosen:
        task, start = trial.run.config.task, trial.variant.warm_starts.get(scale)
        if "Markovian" in trial.variant.name:
            assert task.prompt == ("history" if "non-Markovian" in trial.variant.name else "markov")
        if start is not None:
            assert f"prompt={task.prompt}" in start.arguments
        elif scale == "tiny":
            made = json.loads((Path(resolve_model(trial.run.config.policy.model)) / "training.json").read_text())
            assert made["request"]["task"]["prompt"] == task.prompt


def test_the_alfworld_table_holds_the_papers_figures_of_all_columns():
    alfworld = EXPERIMENTS["alfworld"]
    trained = {column.key for column in alfworld.columns if not column.before}
    assert all(set(variant.paper) == trained for variant in alfworld.variants)


def test_presets_of_all_experiments_are_named_after_task_and_scale():
    presets = {v.preset(scale) for e in EXPERIMENTS.values() for v in e.variants for scale in SCALES}
    assert presets == {f"{t}-{s}" for t in ("numberline", "blackjack", "sequence", "alfworld") for s in ("tiny", "7b")}
    assert load_preset("sequence-7b").task.name == "numbersequence"
