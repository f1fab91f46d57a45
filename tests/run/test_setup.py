import os
from pathlib import Path

import pytest

from gflowvlm.run.checkpoints import checkpoint_steps, latest_checkpoint, prune_checkpoints
from gflowvlm.run.setup import new_run, open_run, run_lock
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError


def test_a_new_run_is_reopened_with_the_same_configuration(tmp_path):
    config = RunConfig(seed=5)
    new_run(config, tmp_path / "r")
    folder, reopened = open_run(tmp_path / "r")
    assert reopened == config
    assert folder.root == (tmp_path / "r").resolve()


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("first", "did you mean runs/first?"),
        ("runs/frist", "did you mean runs/first?"),
        ("frist", "did you mean runs/first?"),
        ("runs", "did you mean 'runs/my run'?"),
        ("runs/first/adapters", "`gflowvlm train --run runs/first/adapters` starts one"),
        ("chess", "`gflowvlm train --run chess` starts one"),
    ],
)
def test_a_folder_without_a_run_is_answered_with_the_run_that_was_meant(asked, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_run(RunConfig(), Path("runs/first"))
    os.utime("runs/first/config.yaml", (1, 1))
    new_run(RunConfig(), Path("runs/my run"))
    with pytest.raises(UserError) as raised:
        open_run(Path(asked))
    assert str(raised.value) == f"{asked}: no run there (no config.yaml); {meant}"


def test_only_one_driver_holds_a_run(tmp_path):
    folder = new_run(RunConfig(), tmp_path / "r")
    with run_lock(folder), pytest.raises(UserError, match="another `gflowvlm train`"), run_lock(folder):
        pass
    with run_lock(folder):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run's folder"):
        new_run(RunConfig(), tmp_path / "file" / "r")


def test_half_written_checkpoints_are_not_seen_and_old_ones_go(tmp_path):
    for name in ("step-00000001", "step-00000002", "step-00000010", ".step-00000011.x.partial", "other"):
        (tmp_path / name).mkdir()
    assert list(checkpoint_steps(tmp_path)) == [1, 2, 10]
    assert latest_checkpoint(tmp_path).name == "step-00000010"
    assert latest_checkpoint(tmp_path, step=3) is None
    prune_checkpoints(tmp_path, keep=2)
    assert list(checkpoint_steps(tmp_path)) == [2, 10]
    # A learner that is killed again and again while it writes must not fill the disk.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-00000002", "step-00000010"]
    assert latest_checkpoint(tmp_path / "missing") is None
