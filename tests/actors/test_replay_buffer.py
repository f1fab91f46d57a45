"""The replay buffer: what it keeps, what it samples, what survives."""

import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowvlm.actors.replay_buffer import QUEUE_SLACK, ReplayBuffer
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import Trajectory, from_arrow, to_record_batch
from tests.actors.made_trajectories import make_group, make_trajectory


def buffer(directory: Path | None = None, seed: int = 0, **changed: Any) -> ReplayBuffer:
    return ReplayBuffer(BufferSettings(**changed), seed, directory)


def append(target: ReplayBuffer, trajectories: list[Trajectory]) -> list[str]:
    return target.append(to_record_batch(trajectories))


def groups_in(batch: pa.RecordBatch) -> list[int]:
    """Group indices of a batch, in order, each once."""
    return list(dict.fromkeys(int(name[1:9]) for name in batch["group_id"].to_pylist()))


def test_what_was_appended_comes_back_unchanged() -> None:
    made = make_group(0, 3, expert=True, log_reward=1.5)
    target = buffer()
    assert append(target, made) == [t.trajectory_id for t in made]
    back = from_arrow(target.sample(step=0, groups=1, version=0))
    assert [t.trajectory_id for t in back] == [t.trajectory_id for t in made]
    assert back[:3] == made[:3]
    assert all(math.isnan(p) for p in back[3].steps[0].sampler_log_probs)


def test_a_repeated_append_is_acknowledged_and_changes_nothing(tmp_path: Path) -> None:
    target = buffer(tmp_path)
    made = make_group(0, 3)
    first = append(target, made)
    assert append(target, made) == first
    assert append(target, [*made[:2], make_trajectory("new", "g00000001-0a"), made[2]]) == [
        *first[:2],
        "new",
        first[2],
    ]
    assert target.stats()["accepted"] == 4
    assert buffer(tmp_path).stats()["accepted"] == 4


def test_an_id_twice_in_one_append_counts_once() -> None:
    target = buffer()
    append(target, make_group(0, 2) * 2)
    assert target.stats()["size"] == 2


def test_sampled_groups_are_whole() -> None:
    target = buffer(newest_share=0.5)
    for index in range(6):
        append(target, make_group(index, 3, expert=index % 2 == 0))
    sampled = target.sample(step=3, groups=4, version=0)
    ids = sampled["group_id"].to_pylist()
    assert len(groups_in(sampled)) == 4
    for index in groups_in(sampled):
        assert ids.count(f"g{index:08d}-0a") == (4 if index % 2 == 0 else 3)


def test_the_newest_share_comes_first_and_newest_first() -> None:
    target = buffer(newest_share=0.5)
    for index in range(10):
        append(target, make_group(index, log_reward=4.0 if index < 5 else 0.0))
    for step in range(5):
        assert groups_in(target.sample(step, 4, version=0))[:2] == [9, 8]
    assert groups_in(buffer_with(10, newest_share=1.0).sample(0, 3, 0)) == [9, 8, 7]


def test_a_small_batch_has_the_newest_group_unless_the_share_is_zero() -> None:
    for share, groups in ((0.5, 1), (0.1, 4)):
        target = buffer_with(10, newest_share=share)
        assert all(groups_in(target.sample(step, groups, 0))[0] == 9 for step in range(20))
    drawn = [groups_in(buffer_with(10, newest_share=0.0).sample(step, 1, 0)) for step in range(20)]
    assert any(groups != [9] for groups in drawn)


def buffer_with(count: int, **changed: Any) -> ReplayBuffer:
    target = buffer(**changed)
    for index in range(count):
        append(target, make_group(index))
    return target


def test_the_rest_is_drawn_in_proportion_to_the_exponential_of_the_best_log_reward() -> None:
    target = buffer(newest_share=0.0, priority_temperature=2.0)
    rewards = [0.0, 1.0, 2.0, 4.0]
    for index, reward in enumerate(rewards):
        best = make_trajectory(f"{index}/best", f"g{index:08d}-0a", log_reward=reward)
        append(target, [make_trajectory(f"{index}/worst", f"g{index:08d}-0a", log_reward=-1.0), best])
    draws = 4000
    counts = [0] * 4
    for step in range(draws):
        counts[groups_in(target.sample(step, 1, 0))[0]] += 1
    total = sum(math.exp(r / 2) for r in rewards)
    for count, reward in zip(counts, rewards, strict=True):
        expected = math.exp(reward / 2) / total
        deviation = math.sqrt(expected * (1 - expected) / draws)
        assert abs(count / draws - expected) < 4 * deviation


def test_no_group_is_drawn_twice_in_a_batch() -> None:
    target = buffer_with(5, newest_share=0.4)
    for step in range(20):
        assert sorted(groups_in(target.sample(step, 5, 0))) == [0, 1, 2, 3, 4]


def test_sampling_is_a_function_of_seed_step_and_accepted_order() -> None:
    one, same, other = (buffer_with(20, seed=seed, newest_share=0.0) for seed in (1, 1, 2))
    drawn = [groups_in(one.sample(step, 4, 0)) for step in range(6)]
    assert [groups_in(same.sample(step, 4, 0)) for step in reversed(range(6))] == drawn[::-1]
    assert [groups_in(other.sample(step, 4, 0)) for step in range(6)] != drawn
    assert len({tuple(groups) for groups in drawn}) > 1


def test_stale_groups_are_not_sampled_and_experts_are_never_stale() -> None:
    target = buffer(replay_staleness=3)
    append(target, make_group(0, version=0))
    append(target, make_group(1, version=0, expert=True))
    append(target, make_group(2, version=2))
    append(target, [make_trajectory("e", "g00000003-0a", expert=True)])
    assert target.available(3) == 4
    # The expert in group 1 does not make its group fresh; group 3 is the expert's alone.
    assert target.available(4) == 2
    assert sorted(groups_in(target.sample(0, 2, version=4))) == [2, 3]
    with pytest.raises(ValueError, match="2 are available at version 4"):
        target.sample(0, 3, version=4)


def test_a_group_is_as_old_as_its_oldest_answer() -> None:
    target = buffer(replay_staleness=3)
    append(target, [*make_group(0, version=8), make_trajectory("old", "g00000000-0a", version=5)])
    assert target.available(8) == 1
    assert target.available(9) == 0


def test_stale_groups_leave_memory_however_well_rewarded() -> None:
    target = buffer(replay_staleness=2)
    append(target, make_group(0, version=0, log_reward=4.6))
    append(target, make_group(1, version=2))
    assert target.stats()["groups"] == 2
    append(target, make_group(2, version=3))
    assert groups_in(target.content()) == [1, 2]
    assert target.stats()["evicted"] == 2


def test_the_lowest_priority_leaves_first_and_the_oldest_of_equals() -> None:
    target = buffer(capacity=8, newest_share=0.0)
    for index, reward in enumerate([2.0, 1.0, 3.0, 1.0]):
        append(target, make_group(index, log_reward=reward))
    append(target, make_group(4, log_reward=2.0))
    assert groups_in(target.content()) == [0, 2, 3, 4]
    append(target, make_group(5, log_reward=2.0))
    assert groups_in(target.content()) == [0, 2, 4, 5]
    append(target, make_group(6, log_reward=2.0))
    assert groups_in(target.content()) == [2, 4, 5, 6]


def test_new_groups_are_spared_however_badly_rewarded() -> None:
    target = buffer(capacity=8, newest_share=0.5)
    for index in range(4):
        append(target, make_group(index, log_reward=4.0))
    append(target, make_group(4, log_reward=0.0))
    append(target, make_group(5, log_reward=0.0))
    assert groups_in(target.content()) == [2, 3, 4, 5]
    append(target, make_group(6, log_reward=4.0))
    assert groups_in(target.content()) == [2, 3, 5, 6]


def test_experts_do_not_count_against_capacity_or_as_accepted() -> None:
    # A capacity of one batch must hold the batch, expert trajectories added or not.
    target = buffer(capacity=8, newest_share=1.0)
    for index in range(4):
        append(target, make_group(index, expert=True))
    stats = target.stats()
    assert (stats["size"], stats["groups"], stats["expert"], stats["evicted"]) == (12, 4, 4, 0)
    assert (stats["accepted"], stats["accepted_experts"]) == (8, 4)


def test_groups_of_the_expert_alone_count_as_accepted_and_against_capacity() -> None:
    target = buffer(capacity=4, newest_share=1.0)
    for index in range(3):
        append(target, [make_trajectory(f"e{index}/{k}", f"g{index:08d}-0a", expert=True) for k in range(2)])
    stats = target.stats()
    assert (stats["accepted"], stats["accepted_experts"], stats["accepted_by_version"]) == (6, 6, {-1: 6})
    assert (stats["size"], stats["evicted"]) == (4, 2)


def test_a_group_larger_than_the_capacity_is_kept_while_it_is_the_newest() -> None:
    target = buffer(capacity=2)
    append(target, make_group(0, 5))
    assert target.stats()["size"] == 5
    append(target, make_group(1, 5))
    assert groups_in(target.content()) == [1]


def test_late_members_join_their_group() -> None:
    target = buffer(newest_share=1.0)
    made = make_group(0, 4)
    append(target, made[:2])
    append(target, make_group(1))
    append(target, made[2:])
    assert groups_in(target.sample(0, 1, 0)) == [0]
    assert target.sample(0, 1, 0).num_rows == 4
    assert target.stats()["groups"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        # Only staleness evicts.
        {"capacity": 10_000, "replay_staleness": 5, "max_staleness": 4},
        # Only the capacity does; versions stay fresh.
        {"capacity": 8, "replay_staleness": 1_000_000, "newest_share": 0.5},
        {"capacity": 10_000, "replay_staleness": 5, "max_staleness": 4, "newest_share": 0.0},
    ],
)
def test_queues_do_not_grow_with_the_groups_that_have_left(settings: dict[str, Any]) -> None:
    buffer = ReplayBuffer(BufferSettings(**settings), 0, None)
    longest = 0
    for version in range(600):
        buffer.append(to_record_batch(make_group(version, version=version, log_reward=version % 7)))
        longest = max(longest, *map(len, (buffer._spared, buffer._by_priority, buffer._by_version)))
    assert buffer.stats()["groups"] < 10
    assert longest <= 2 * 10 + QUEUE_SLACK + 1


def test_counts_are_reported() -> None:
    target = buffer()
    assert target.stats()["newest_success"] is None
    assert target.stats()["largest_group_index"] is None
    append(target, make_group(4, version=1, success=True))
    append(target, make_group(12, version=2, expert=True))
    stats = target.stats()
    assert stats["accepted_by_version"] == {1: 2, 2: 2}
    assert (stats["newest_version"], stats["newest_success"], stats["largest_group_index"]) == (2, 0.5, 12)
    assert stats["accepted_groups"] == 2
    assert stats["bytes"] > 0


def test_a_foreign_schema_is_refused() -> None:
    with pytest.raises(UserError, match="schema version"):
        buffer().append(pa.RecordBatch.from_pylist([{"a": 1}]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_log_rewards_must_be_finite(wrong: float, tmp_path: Path) -> None:
    target = buffer(tmp_path)
    with pytest.raises(ValueError, match="must be finite"):
        append(target, make_group(0, log_reward=wrong))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_append_writes_nothing(tmp_path: Path) -> None:
    assert append(buffer(tmp_path), []) == []
    assert list(tmp_path.iterdir()) == []


# On disk


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_restarted_buffer_is_the_same_buffer(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run") / "trajectories"
    changed = {
        "capacity": data.draw(st.integers(4, 20)),
        "newest_share": data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "replay_staleness": data.draw(st.integers(0, 4)),
    }
    target = buffer(folder, **changed)
    for index in range(data.draw(st.integers(0, 15))):
        made = make_group(
            data.draw(st.integers(0, index)),  # an earlier index: late members of a known group, or repeats
            data.draw(st.integers(1, 4)),
            expert=data.draw(st.booleans()),
            log_reward=data.draw(st.sampled_from([0.0, 1.0, 4.0])),
            version=index // 3,
        )
        append(target, made)
        held = target.content()
        counted = {"size": held.num_rows, "expert": sum(held["expert"].to_pylist()), "groups": len(groups_in(held))}
        assert counted.items() <= target.stats().items()
    again = buffer(folder, **changed)
    assert again.stats() == target.stats()
    assert again.content().to_pylist().__repr__() == target.content().to_pylist().__repr__()
    version = target.stats()["newest_version"]
    groups = target.available(version)
    if groups > 0:
        for step in range(3):
            assert groups_in(again.sample(step, groups, version)) == groups_in(target.sample(step, groups, version))
    append(target, make_group(99))
    append(again, make_group(99))
    assert again.stats() == target.stats()


def test_evicted_trajectories_stay_on_disk_as_the_runs_record(tmp_path: Path) -> None:
    target = buffer(tmp_path, capacity=2)
    for index in range(3):
        append(target, make_group(index))
    assert target.stats()["size"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:08d}.parquet" for i in range(3)]


def test_an_unfinished_file_is_ignored(tmp_path: Path) -> None:
    append(buffer(tmp_path), make_group(0))
    (tmp_path / "00000001.parquet.partial").write_bytes(b"PAR1 half")
    target = buffer(tmp_path)
    assert target.stats()["accepted"] == 2
    append(target, make_group(1))
    assert buffer(tmp_path).stats()["accepted"] == 4


@pytest.mark.parametrize("damage", [b"", b"PAR1 nothing of use PAR1", None])
def test_a_damaged_file_is_named(damage: bytes | None, tmp_path: Path) -> None:
    target = buffer(tmp_path)
    append(target, make_group(0))
    append(target, make_group(1))
    path = tmp_path / "00000001.parquet"
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(UserError, match=r"00000001\.parquet: not a readable trajectory file"):
        buffer(tmp_path)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_refuses_the_append_and_nothing_else(tmp_path: Path) -> None:
    target = buffer(tmp_path)
    append(target, make_group(0))
    before = target.stats()
    with file_size_limit(500), pytest.raises(UserError, match=r"trajectories cannot be written.*free space") as error:
        append(target, make_group(1))
    assert str(tmp_path) in str(error.value)
    after = target.stats()
    assert (after["refused"], after["last_refusal"]) == (2, str(error.value))
    assert {**after, "refused": 0, "last_refusal": None} == before
    assert [p.name for p in tmp_path.iterdir()] == ["00000000.parquet"]
    append(target, make_group(1))
    assert buffer(tmp_path).stats()["accepted"] == 4


def test_a_folder_that_vanished_refuses_the_append(tmp_path: Path) -> None:
    target = buffer(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="cannot be written"):
        append(target, make_group(0))
    assert target.stats()["accepted"] == 0


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        buffer(tmp_path / "file" / "trajectories")


WRITER = """
import sys
from pathlib import Path
from gflowvlm.actors.replay_buffer import QUEUE_SLACK, ReplayBuffer
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.trajectory import to_record_batch
from tests.actors.made_trajectories import make_group

buffer = ReplayBuffer(BufferSettings(), 0, Path(sys.argv[1]))
index = buffer.stats()["accepted_groups"]
while True:
    print(*buffer.append(to_record_batch(make_group(index, 3))), flush=True)
    index += 1
"""


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(15):
                acknowledged += writer.stdout.readline().split()
            writer.kill()
            acknowledged += writer.stdout.read().split()
    held = buffer(tmp_path).content()["trajectory_id"].to_pylist()
    assert len(held) == len(set(held))
    assert len(acknowledged) >= 3 * 15 * 3
    assert set(acknowledged) <= set(held)
