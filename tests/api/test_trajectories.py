"""Which of a run's trajectories a filter leaves, and what is given of them."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.api.trajectories import Filters, Trajectories
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import (
    SCHEMA_VERSION_1,
    SCHEMA_VERSION_2,
    TRAJECTORY_SCHEMA,
    Validity,
    from_arrow,
    read_trajectories,
    to_record_batch,
)
from tests.actors.made_trajectories import make_group, make_trajectory, write_groups
from tests.shared.earlier_files import write_in_schema


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_groups(tmp_path)


def found(run: Path, limit: int | None = None, **filters: object) -> list[str]:
    selected = Trajectories(run, Filters(**filters))  # type: ignore[arg-type]
    trajectories = list(selected)
    assert len(selected) == len(trajectories) == selected.dataset().count_rows()
    assert [t.trajectory_id for t in selected.newest(1000)] == [t.trajectory_id for t in trajectories]
    if limit is not None:
        trajectories = selected.newest(limit)
    return [f"{int(t.group_id[1:9])}/{t.trajectory_id.rsplit('/')[1]}" for t in trajectories]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1", "2/expert", "3/0", "3/1", "4/0", "4/1"]),
        ({"success": True}, ["2/expert", "3/0", "3/1", "4/0", "4/1"]),
        ({"success": False}, ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]),
        ({"expert": True}, ["2/expert"]),
        ({"success": True, "expert": False, "split": "id"}, ["3/0", "3/1"]),
        ({"split": "ood"}, ["4/0", "4/1"]),
        ({"task": "numberline", "version": 1}, ["1/0", "1/1"]),
        ({"min_version": 3}, ["3/0", "3/1", "4/0", "4/1"]),
        ({"group": "2"}, ["2/0", "2/1", "2/expert"]),
        ({"group": "g00000003-0a"}, ["3/0", "3/1"]),
        ({"group": "77"}, []),
        ({"instance": 7, "group": "0"}, ["0/0", "0/1"]),
        ({"instance": 8}, []),
        ({"end": "step_limit", "version": 4}, ["4/0", "4/1"]),
        ({"end": "done"}, []),
        ({"validity": "malformed"}, []),
        ({"validity": "valid", "success": True, "min_version": 4}, ["4/0", "4/1"]),
        ({"limit": 3}, ["3/1", "4/0", "4/1"]),
        ({"limit": 1, "success": False}, ["2/1"]),
    ],
)
def test_filters_leave_what_was_asked_for(filters: dict[str, object], expected: list[str], run: Path) -> None:
    assert found(run, **filters) == expected  # type: ignore[arg-type]


def test_a_version_is_found_among_those_of_all_steps(tmp_path: Path) -> None:
    mixed = make_trajectory("t/0", "g00000000-0a", version=4, steps=2)
    mixed = replace(mixed, steps=[replace(mixed.steps[0], policy_version=3), mixed.steps[1]])
    ReplayBuffer(BufferSettings(), 0, tmp_path / "trajectories").append(to_record_batch([mixed]))
    assert found(tmp_path, version=3) == found(tmp_path, version=4) == found(tmp_path, min_version=3) == ["0/0"]
    assert found(tmp_path, version=2) == found(tmp_path, min_version=4) == []


@pytest.mark.parametrize("keep", [0, 4, 300])
def test_a_damaged_file_is_named(keep: int, run: Path) -> None:
    path = run / "trajectories" / "00000003.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00000003\.parquet: not a readable trajectory file"):
        found(run)


def test_damage_inside_a_file_is_an_error_of_one_line(run: Path) -> None:
    path = run / "trajectories" / "00000003.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        found(run)


def test_files_of_another_schema_are_named(run: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), run / "trajectories" / "00000009.parquet")
    with pytest.raises(UserError, match=r"00000009\.parquet: not in the trajectory schema"):
        found(run)


def test_a_run_without_any_trajectory_yet_has_none(tmp_path: Path) -> None:
    (tmp_path / "trajectories").mkdir()
    assert found(tmp_path) == []


def test_a_trajectory_is_found_by_what_became_of_one_response(tmp_path: Path) -> None:
    made = make_trajectory("t/0", "g00000000-0a")
    made = replace(made, steps=[made.steps[0], replace(made.steps[1], validity=Validity.INADMISSIBLE)])
    ReplayBuffer(BufferSettings(), 0, tmp_path / "trajectories").append(to_record_batch([made]))
    assert found(tmp_path, validity="inadmissible") == found(tmp_path, validity="valid") == ["0/0"]
    assert found(tmp_path, validity="malformed") == []


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"end": "finished"}, "end 'finished': there is no such end; use one of: done, environment"),
        ({"validity": "bad"}, "validity 'bad': there is no such validity; use one of: valid, malformed"),
    ],
)
def test_a_value_that_does_not_exist_is_refused(filters: dict[str, str], message: str, run: Path) -> None:
    with pytest.raises(UserError, match=message):
        Trajectories(run, Filters(**filters))  # type: ignore[arg-type]


def test_the_table_is_the_schemas_and_the_summary_has_a_row_each(run: Path) -> None:
    selected = Trajectories(run, Filters(success=True))
    assert selected.to_table().schema.equals(TRAJECTORY_SCHEMA)
    assert [t.actions for t in from_arrow(selected.to_table())] == [t.actions for t in selected]
    assert selected.to_table(["instance_seed"]).to_pydict() == {"instance_seed": [7] * 5}
    with pytest.raises(UserError, match="column 'reward': a trajectory has no such column"):
        selected.to_table(["reward"])
    frame = selected.to_pandas()
    assert frame["version"].tolist() == [-1, 3, 3, 4, 4]
    assert frame["log_reward"].tolist() == [4.0, 0.0, 0.0, 0.0, 0.0]
    assert frame["actions"].iloc[0] == ("+", "+")
    assert len(Trajectories(run, Filters(group="77")).to_pandas()) == 0


def test_what_is_written_later_is_not_in_it(run: Path) -> None:
    selected = Trajectories(run, Filters())
    ReplayBuffer(BufferSettings(), 0, run / "trajectories").append(to_record_batch(make_group(5)))
    assert len(selected) == 11
    assert len(Trajectories(run, Filters())) == 13


def test_it_says_what_was_asked_for(run: Path) -> None:
    assert repr(Trajectories(run, Filters(version=3))) == f"<2 trajectories of {str(run)!r}, version=3>"


@pytest.mark.parametrize("schema", [SCHEMA_VERSION_1, SCHEMA_VERSION_2], ids=["1", "2"])
def test_files_of_earlier_schemas_are_found_beside_those_of_today(run: Path, schema: pa.Schema) -> None:
    before = list(Trajectories(run, Filters()))
    file = sorted((run / "trajectories").iterdir())[0]
    write_in_schema(read_trajectories(file), schema, file)
    after = list(Trajectories(run, Filters()))
    assert [replace(t, steps=before[n].steps) for n, t in enumerate(after)] == before
    assert [step.response_ids for t in after for step in t.steps] == [s.response_ids for t in before for s in t.steps]
    assert found(run, version=3) == found(write_groups(run.parent / "today"), version=3)
