"""The replay buffer's actor writes what arrives at the same time together; run here without Ray."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gflowvlm.actors import buffer_actor
from gflowvlm.actors.buffer_actor import APPENDS_PER_FILE, ReplayBufferActor
from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import read_parquet, to_record_batch
from tests.actors.made_trajectories import make_group


def actor(folder: Path) -> ReplayBufferActor:
    return ReplayBufferActor(BufferSettings(), 0, str(folder), "buffer")


def test_appends_that_arrive_together_share_files_and_each_is_acknowledged(tmp_path: Path) -> None:
    groups = [make_group(index, 3) for index in range(APPENDS_PER_FILE + 10)]

    async def play() -> list[list[str]]:
        buffer = actor(tmp_path)
        acknowledged = await asyncio.gather(*(buffer.append(to_record_batch(group)) for group in groups))
        assert (await buffer.stats())["append"]["trajectories"] == 3 * len(groups)
        assert [a.accepted for a in acknowledged] == sorted(a.accepted for a in acknowledged)
        assert acknowledged[-1].accepted == 3 * len(groups)
        return [a.trajectory_ids for a in acknowledged]

    assert asyncio.run(play()) == [[t.trajectory_id for t in group] for group in groups]
    assert len(list(tmp_path.iterdir())) == 2
    again = ReplayBuffer(BufferSettings(), 0, tmp_path)
    assert again.content()["trajectory_id"].to_pylist() == [t.trajectory_id for group in groups for t in group]
    assert (again.accepted, again.stats()["groups"]) == (3 * len(groups), len(groups))


def test_nothing_is_acknowledged_before_its_file_is_there(tmp_path: Path) -> None:
    async def play() -> None:
        buffer = actor(tmp_path)
        for index in range(20):
            first, second = (
                asyncio.create_task(buffer.append(to_record_batch(make_group(2 * index + k)))) for k in (0, 1)
            )
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            written = ReplayBuffer(BufferSettings(), 0, tmp_path).content()["trajectory_id"].to_pylist()
            assert all(set(task.result().trajectory_ids) <= set(written) for task in (first, second) if task.done())
            await asyncio.gather(first, second)

    asyncio.run(play())


def test_a_repeated_append_counts_once_also_beside_the_first(tmp_path: Path) -> None:
    async def play() -> int:
        buffer, batch = actor(tmp_path), to_record_batch(make_group(0, 3))
        first, again = await asyncio.gather(buffer.append(batch), buffer.append(batch))
        assert first == again
        return int((await buffer.stats())["accepted"])

    assert asyncio.run(play()) == 3


def test_only_the_caller_of_an_impossible_append_is_refused(tmp_path: Path) -> None:
    async def play() -> list[Any]:
        buffer = actor(tmp_path)
        groups = [make_group(0), make_group(1, log_reward=math.nan), make_group(2)]
        appends = (buffer.append(to_record_batch(group)) for group in groups)
        return await asyncio.gather(*appends, return_exceptions=True)

    first, impossible, last = asyncio.run(play())
    assert isinstance(impossible, ValueError)
    assert first.trajectory_ids == [t.trajectory_id for t in make_group(0)]
    assert last.trajectory_ids == [t.trajectory_id for t in make_group(2)]
    assert ReplayBuffer(BufferSettings(), 0, tmp_path).accepted == 4


def test_all_that_were_to_be_written_are_refused_by_a_full_disk_and_later_ones_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "trajectories"

    async def play() -> tuple[list[object], list[str]]:
        buffer = actor(folder)
        folder.rmdir()
        appends = (buffer.append(to_record_batch(make_group(index))) for index in range(3))
        refused = await asyncio.gather(*appends, return_exceptions=True)
        assert (await buffer.stats())["refused"] == 6
        folder.mkdir()
        return refused, (await buffer.append(to_record_batch(make_group(0)))).trajectory_ids

    refused, taken = asyncio.run(play())
    assert all(isinstance(error, UserError) for error in refused)
    assert taken == [t.trajectory_id for t in make_group(0)]
    assert ReplayBuffer(BufferSettings(), 0, folder).accepted == 2


def test_whoever_waits_for_a_joint_append_that_goes_wrong_is_told_why_and_the_next_ones_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> tuple[list[object], list[object]]:
        buffer = actor(tmp_path)

        def overflow(_: object) -> None:
            raise pa.ArrowInvalid("offset overflow while concatenating arrays")

        with monkeypatch.context() as patched:
            patched.setattr(ReplayBuffer, "append_checked", lambda *_: overflow(_))
            appends = (buffer.append(to_record_batch(make_group(index))) for index in range(APPENDS_PER_FILE + 2))
            failed = await asyncio.wait_for(asyncio.gather(*appends, return_exceptions=True), 10)
        more = (buffer.append(to_record_batch(make_group(index))) for index in range(2))
        return failed, await asyncio.wait_for(asyncio.gather(*more), 10)

    failed, taken = asyncio.run(play())
    assert {(type(error), str(error)) for error in failed} == {
        (pa.ArrowInvalid, "offset overflow while concatenating arrays")
    }
    assert [a.trajectory_ids for a in taken] == [[t.trajectory_id for t in make_group(index)] for index in range(2)]


def test_large_appends_are_not_put_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_actor, "BYTES_PER_FILE", 3 * 2**20)

    async def play() -> None:
        buffer = actor(tmp_path)
        groups = [make_group(index, 1, image=bytes(size * 2**20)) for index, size in enumerate([1, 1, 1, 1, 4, 1])]
        await asyncio.wait_for(asyncio.gather(*(buffer.append(to_record_batch(group)) for group in groups)), 10)

    asyncio.run(play())
    assert [read_parquet(path).num_rows for path in trajectory_files(tmp_path)] == [3, 2, 1]


def test_a_caller_that_gave_up_does_not_harm_the_others(tmp_path: Path) -> None:
    async def play() -> list[str]:
        buffer = actor(tmp_path)
        first = asyncio.create_task(buffer.append(to_record_batch(make_group(0))))
        second = asyncio.create_task(buffer.append(to_record_batch(make_group(1))))
        await asyncio.sleep(0)
        first.cancel()
        return (await asyncio.wait_for(second, 10)).trajectory_ids

    assert asyncio.run(play()) == [t.trajectory_id for t in make_group(1)]
    assert ReplayBuffer(BufferSettings(), 0, tmp_path).accepted == 4


@pytest.mark.parametrize("groups", [1, 40])
def test_waiting_learners_hear_of_groups_that_were_written_together(groups: int, tmp_path: Path) -> None:
    async def play() -> int:
        buffer = actor(tmp_path)
        sample = asyncio.create_task(buffer.wait_sample(0, 4, 0, 2 * groups, 10.0))
        await asyncio.gather(*(buffer.append(to_record_batch(make_group(index))) for index in range(groups)))
        batch = await sample
        assert batch is not None
        return int(batch.num_rows)

    assert asyncio.run(play()) == 2 * min(groups, 4)


def test_a_step_that_one_learner_has_is_given_to_the_others_of_a_closed_buffer_too(tmp_path: Path) -> None:
    async def play() -> list[bool]:
        buffer = actor(tmp_path)
        await buffer.append(to_record_batch(make_group(0)))
        first = await buffer.wait_sample(4, 1, 0, 0, 10.0)
        await buffer.close()
        second = await buffer.wait_sample(4, 1, 0, 0, 10.0)
        next_step = await buffer.wait_sample(5, 1, 0, 0, 10.0)
        return [first is not None and first.equals(second), next_step is None]

    assert asyncio.run(play()) == [True, True]
