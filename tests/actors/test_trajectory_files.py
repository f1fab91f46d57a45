import os

import pytest

from gflowvlm.actors.trajectory_files import TrajectoryFiles, trajectory_files
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import to_record_batch
from tests.actors.made_trajectories import make_group


def test_a_failed_write_takes_no_file_away_that_another_has_written(tmp_path, monkeypatch):
    first, second = TrajectoryFiles(tmp_path), TrajectoryFiles(tmp_path)
    first.append(to_record_batch(make_group(0, 2)))
    (written,) = trajectory_files(tmp_path)
    content = written.read_bytes()

    def replace(source, target):
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="trajectories cannot be written"):
        second.append(to_record_batch(make_group(1, 2)))
    assert written.read_bytes() == content
    assert list(tmp_path.iterdir()) == [written]
