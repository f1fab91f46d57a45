"""Models that variants start from: made by commands that exist, begun, resumed or left alone."""

import os

from typer.testing import CliRunner

from gflowvlm.cli.main import app
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.studies.experiments.catalog import EXPERIMENTS
from gflowvlm.studies.experiments.warm_starting import is_made, make_warm_start, warm_start_command
from gflowvlm.warm_starts import supervised
from tests.studies.experiments.small_experiment import STARTED, select


def test_warm_starts_are_commands_that_gflowvlm_sft_takes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(supervised, "start", lambda request, *_: asked.append(request) or True)
    starts = {s for e in EXPERIMENTS.values() for v in e.variants for s in v.warm_starts.values()}
    for start in starts:
        result = CliRunner().invoke(app, list(warm_start_command(start, tmp_path / start.name)))
        assert result.exit_code == 0, result.output
    assert len(asked) == len(starts) >= 6


def test_a_variant_starts_from_the_model_that_is_made_for_it(tmp_path):
    chosen = select(tmp_path).trials()
    made = tmp_path.resolve() / "models" / "taught"
    assert list(chosen.warm_starts) == [(STARTED, made)]
    models = {trial.variant.name: trial.run.config.policy.model for trial in chosen.chosen}
    assert models == {"Sub TB (λ)": "numberline-tiny", "DB": str(made)}
    paper = select(tmp_path, scale="paper").trials()
    assert paper.warm_starts == ()
    assert {trial.run.config.policy.model for trial in paper.chosen} == {os.path.abspath("models/numberline-7b")}
    own = select(tmp_path, overrides=["policy.model=numberline-tiny"]).trials()
    assert own.warm_starts == ()


def test_a_warm_start_is_begun_resumed_or_left_alone(tmp_path):
    folder = tmp_path / "taught"
    assert warm_start_command(STARTED, folder) == ("sft", "--out", str(folder), *STARTED.arguments)
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "training.json").write_text("{}")
    assert warm_start_command(STARTED, folder) == ("sft", "--resume", "--out", str(folder))
    assert not is_made(folder)
    (folder / "training.json").write_text('{"final_loss": 0.1}')
    assert is_made(folder)


def test_a_warm_start_that_stopped_before_its_first_checkpoint_is_begun_anew(tmp_path, monkeypatch):
    folder = tmp_path / "taught"
    folder.mkdir()
    (folder / "training.json").write_text("{}")
    asked = []

    def run_command(arguments, *, stop):
        asked.append(arguments)
        if len(asked) == 1:
            return INTERRUPTED
        (folder / "training.json").write_text('{"final_loss": 0.1}')
        return 0

    monkeypatch.setattr("gflowvlm.studies.experiments.warm_starting.run_command", run_command)
    assert not make_warm_start(STARTED, folder, lambda: False)
    assert make_warm_start(STARTED, folder, lambda: False)
    assert asked == [("sft", "--out", str(folder), *STARTED.arguments)] * 2


def test_a_warm_start_is_found_below_a_folder_whose_name_means_something_in_yaml(tmp_path):
    out = tmp_path / "runs #1: [new]"
    (trial,) = select(out, seeds=1, only=["db"]).trials().chosen
    assert trial.run.config.policy.model == str(out.resolve() / "models" / "taught")
    assert list(select(out, seeds=1).trials().warm_starts) == [(STARTED, out.resolve() / "models" / "taught")]
