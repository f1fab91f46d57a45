"""Which trajectories a page shows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import to_record_batch
from gflowvlm.studies.report.selection import select_trajectories
from tests.actors.made_trajectories import make_group


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Groups 0..10 of three; the even ones are of numberline, the odd ones of blackjack."""
    buffer = ReplayBuffer(BufferSettings(), 0, tmp_path)
    for index in range(11):
        made = make_group(index, 3, task="blackjack" if index % 2 else "numberline")
        buffer.append(to_record_batch(made))
    return tmp_path


def shown_groups(folder: Path, limit: int, instance: str | None = None) -> list[int]:
    shown = select_trajectories(folder, limit, instance).trajectories
    assert len(shown) <= limit
    assert len({t.trajectory_id for t in shown}) == len(shown)
    return list(dict.fromkeys(int(t.group_id[1:9]) for t in shown))


@pytest.mark.parametrize(
    ("limit", "groups"),
    [(33, list(range(11))), (1000, list(range(11))), (9, [0, 5, 10]), (11, [0, 5, 10]), (6, [0, 10]), (3, [10])],
)
def test_groups_are_whole_and_spread_from_the_first_to_the_last(limit: int, groups: list[int], folder: Path) -> None:
    assert shown_groups(folder, limit) == groups
    assert len(select_trajectories(folder, limit).trajectories) == 3 * len(groups)


def test_a_group_larger_than_the_limit_is_cut(folder: Path) -> None:
    shown = select_trajectories(folder, 2).trajectories
    assert [t.trajectory_id for t in shown] == ["g00000010-0a/0", "g00000010-0a/1"]


def test_the_instance_asked_for_comes_before_all_others(folder: Path) -> None:
    assert shown_groups(folder, 15, "blackjack/id/7") == [1, 3, 5, 7, 9]
    assert set(shown_groups(folder, 21, "blackjack/id/7")) == {0, 1, 3, 5, 7, 9, 10}
    assert shown_groups(folder, 6, "blackjack/id/7") == [1, 9]


def test_the_rule_says_how_many_of_how_many(folder: Path) -> None:
    assert select_trajectories(folder, 100).rule == "All 33 trajectories of the run are shown."
    rule = select_trajectories(folder, 9, "blackjack/id/7").rule
    assert "9 of the run's 33 trajectories are shown: 3 of 11 groups" in rule
    assert "after those of blackjack/id/7" in rule


def test_an_instance_that_was_not_played_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="--instance numberline/ood/7: nothing of it was played"):
        select_trajectories(folder, 10, "numberline/ood/7")


def test_a_folder_that_is_not_there_holds_none(tmp_path: Path) -> None:
    empty = select_trajectories(tmp_path / "trajectories", 10)
    assert (empty.trajectories, empty.total) == ([], 0)


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "00000004.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"00000004\.parquet: not a readable trajectory file"):
        select_trajectories(folder, 3)


def test_a_file_with_a_value_that_no_trajectory_has_is_named(folder: Path) -> None:
    path = sorted(folder.glob("*.parquet"))[0]
    table = pq.read_table(path)
    ends = pa.array(["bogus"] * table.num_rows, table.schema.field("end").type)
    pq.write_table(table.set_column(table.schema.get_field_index("end"), table.schema.field("end"), ends), path)
    with pytest.raises(UserError, match=rf"{path.name}: holds what is no trajectory"):
        select_trajectories(folder, 100)
