"""What a replay buffer's actor gave and was told holds for the one that comes back in its place; without Ray."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gflowvlm.actors.buffer_actor import RECORD_FILE, ReplayBufferActor
from gflowvlm.actors.trajectory_files import trajectory_files
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import to_record_batch
from tests.actors.made_trajectories import make_group

SETTINGS = BufferSettings(capacity=16, newest_share=0.5, replay_staleness=8)


def actor(folder: Path, name: str = "run-buffer") -> ReplayBufferActor:
    """What Ray makes again, with the same arguments, when the process died."""
    return ReplayBufferActor(SETTINGS, 0, str(folder), name)


async def append(buffer: ReplayBufferActor, *indices: int, **settings: Any) -> None:
    for index in indices:
        await buffer.append(to_record_batch(make_group(index, **settings)))


async def sampled(
    buffer: ReplayBufferActor, step: int, groups: int = 3, timeout_s: float = 0.2
) -> pa.RecordBatch | None:
    return await buffer.wait_sample(step, groups, 0, 0, timeout_s)


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_two_learners_get_the_same_batch_of_a_step_when_the_actor_dies_between_them(tmp_path: Path) -> None:
    async def body() -> None:
        buffer = actor(tmp_path)
        await append(buffer, *range(6))
        first = [await sampled(buffer, step) for step in (4, 5)]
        # What the second learner could be given instead: newer groups, and another number of them.
        await append(buffer, 6, 7)
        back = actor(tmp_path)
        second = [await sampled(back, step, groups=2) for step in (4, 5)]
        assert [a.equals(b) for a, b in zip(first, second, strict=True)] == [True, True]
        third = await sampled(back, 6)
        assert (await sampled(actor(tmp_path), 6)).equals(third)

    run(body)


def test_a_batch_that_was_given_is_found_on_disk_when_its_groups_have_left_memory(tmp_path: Path) -> None:
    async def body() -> None:
        buffer = actor(tmp_path)
        await append(buffer, 0, 1, version=0)
        first = await sampled(buffer, 0, groups=2)
        await append(buffer, 2, version=100)
        assert (await buffer.stats())["groups"] == 1
        assert (await sampled(actor(tmp_path), 0, groups=2)).equals(first)
        trajectory_files(tmp_path)[0].unlink()
        with pytest.raises(UserError, match="2 trajectories that a learner was given are gone from disk"):
            await sampled(actor(tmp_path), 0, groups=2)

    run(body)


def test_a_closed_buffer_stays_closed_and_still_gives_what_one_learner_has(tmp_path: Path) -> None:
    async def body() -> None:
        buffer = actor(tmp_path)
        await append(buffer, 0, 1)
        first = await sampled(buffer, 3)
        await buffer.close()
        back = actor(tmp_path)
        assert await sampled(back, 4) is None
        assert (await sampled(back, 3)).equals(first)

    run(body)


def test_another_driver_of_the_run_starts_with_an_open_buffer_and_draws_anew(tmp_path: Path) -> None:
    async def body() -> None:
        buffer = actor(tmp_path)
        await append(buffer, 0, 1)
        first = await sampled(buffer, 0, groups=2)
        await buffer.close()
        await append(buffer, 2)
        resumed = actor(tmp_path, "resumed-buffer")
        again = await sampled(resumed, 0, groups=2)
        assert again is not None
        assert not again.equals(first)

    run(body)


def test_a_record_that_cannot_be_written_is_one_line_and_nothing_is_given(tmp_path: Path) -> None:
    async def body() -> None:
        buffer = actor(tmp_path)
        await append(buffer, 0)
        # Where a folder stands, no file can.
        (tmp_path / RECORD_FILE).mkdir()
        with pytest.raises(UserError, match=r"sampled\.json: cannot be written"):
            await sampled(buffer, 0)

    run(body)
