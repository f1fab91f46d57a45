"""The end of the replay buffer's actor, in this process."""

import asyncio
from pathlib import Path

import pytest

from gflowvlm.actors.buffer_actor import ReplayBufferActor
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError


def test_closing_ends_all_waiting_also_where_it_cannot_be_written_down(tmp_path: Path) -> None:
    async def close_on_a_full_disk() -> None:
        actor = ReplayBufferActor(RunConfig().replay, 0, str(tmp_path / "there"), "buffer-full")
        waiting = asyncio.create_task(actor.wait_sample(0, 1, 0, 1, timeout_s=20))
        await asyncio.sleep(0.1)
        (tmp_path / "there").rmdir()
        with pytest.raises(UserError, match="cannot be written"):
            await actor.close()
        assert await asyncio.wait_for(waiting, 5) is None

    asyncio.run(close_on_a_full_disk())
