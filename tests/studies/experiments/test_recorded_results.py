"""The records in docs/data are of the experiments as they stand: their commands train nothing."""

import subprocess
from pathlib import Path

import pytest

from gflowvlm.studies.experiments.catalog import EXPERIMENTS
from gflowvlm.studies.experiments.trials import Selection

RECORDS = sorted((Path(__file__).parents[3] / "docs" / "data").glob("*-tiny.tar.xz"))


@pytest.mark.parametrize("records", RECORDS, ids=lambda path: path.name)
def test_recorded_trials_were_made_with_the_settings_of_today(records: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", records, "-C", tmp_path], check=True, timeout=60)
    name = records.name.removesuffix("-tiny.tar.xz")
    selection = Selection(EXPERIMENTS[name], "tiny", 4, (), (), tmp_path / f"{name}-tiny")
    trials = selection.trials().chosen
    kept = [trial for trial in trials if trial.run.folder.config.exists()]
    assert len(kept) > 0
    assert [trial.run.folder.root.name for trial in kept if not trial.recorded] == []
