"""`gflowvlm experiment` with a whole run: through real Ray Tune, the trial with a Ray of its own."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gflowvlm.cli.main import app
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.folder_lock import LOCK
from gflowvlm.studies.experiments.catalog import EXPERIMENTS
from gflowvlm.studies.experiments.results import CURVES, PICTURE, RAW, TABLE
from tests.studies.experiments.small_experiment import finish, select

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "learner.steps=2",
    "learner.groups_per_batch=2",
    "rollout.workers=1",
    "rollout.group_size=2",
    "sampler.engine=transformers",
    "cluster.dashboard=false",
    "evaluation.at_start=false",
    "evaluation.every=2",
    "evaluation.instances=1",
    "evaluation.samples=2",
]


def experiment(out):
    chosen = ["--only", "sft", "--only", "gflownet-var-tb", "--seeds", "1", "--concurrent", "2"]
    return subprocess.run(
        [sys.executable, "-m", "gflowvlm.cli.main", "experiment", "motivating", *chosen, "--out", str(out), *SETTINGS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_a_dry_run_names_every_variant_in_full_on_a_narrow_screen(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["experiment", "numberline-blackjack", "--dry-run", "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for variant in EXPERIMENTS["numberline-blackjack"].variants:
        assert sum(line.startswith(f"{variant.slug}: 4 of 4 runs to do: ") for line in lines) == 1
    settings = " ".join(result.output.split())
    assert "objective.loss=db rollout.expert_on_failure=true buffer.newest_share=0.5" in settings
    assert "runs to do: 120" in settings
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_failed_trials_are_tried_again_and_finished_ones_never(tmp_path):
    out = tmp_path / "out"
    chosen = select(out, EXPERIMENTS["motivating"], seeds=1, only=("gflownet-var-tb",), overrides=SETTINGS)
    (there,) = chosen.trials().chosen
    finish(there, 0.8)
    # What the evaluation at the other temperature writes cannot be written.
    obstacle = out / "sft-0" / "evaluation-id-temperature-1.2.partial"
    obstacle.mkdir(parents=True)
    result = experiment(out)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "failed: sft-0: gflowvlm: --json" in result.stdout
    assert "runs to do: 1, done: 1;" in result.stdout
    assert result.stdout.count("tried again") == 1
    assert result.stdout.count("given up") == 1
    assert "sft-0 failed" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    runs = [RunFolder(out / name) for name in ("sft-0", "gflownet-var-tb-0")]
    assert all(run.summary.exists() for run in runs)
    assert [row["variant"] for row in csv.DictReader((out / RAW).open())] == ["GFlowNet (Var-TB)"]

    obstacle.rmdir()
    trained = [run.metrics.read_bytes() for run in runs]
    result = experiment(out)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "runs to do: 1, done: 1;" in result.stdout
    assert [run.metrics.read_bytes() for run in runs] == trained
    assert [row["variant"] for row in csv.DictReader((out / RAW).open())] == ["SFT", "GFlowNet (Var-TB)"]
    assert all((out / name).exists() for name in (TABLE, PICTURE, CURVES))
    # Nothing of Tune's is shown or kept.
    assert "Trial run_trial" not in result.stdout
    assert {path.name for path in out.iterdir()} == {"sft-0", "gflownet-var-tb-0", TABLE, RAW, PICTURE, CURVES, LOCK}
