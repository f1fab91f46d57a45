"""The replay buffer's actor: waiting, and coming back from a real kill -9."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from gflowvlm.actors.buffer_actor import Acknowledgement, create_buffer_actor, get_buffer
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import to_record_batch
from tests.actors.local_ray import local_ray
from tests.actors.made_trajectories import make_group

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with local_ray():
        yield


def call(method: Any, *arguments: Any) -> Any:
    return ray.get(method.remote(*arguments), timeout=60)


def test_the_buffer_is_found_by_name_and_the_name_is_taken_once(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-named")
    made = make_group(0)
    assert call(actor.append, to_record_batch(made)) == Acknowledgement([t.trajectory_id for t in made], accepted=2)
    stats = call(get_buffer("buffer-named").stats)
    assert stats["accepted"] == 2
    assert stats["append"]["trajectories"] == 2
    assert stats["append"]["trajectories_per_s"] > 0
    with pytest.raises(UserError, match="one already on this cluster"):
        create_buffer_actor(RunConfig(), tmp_path, "buffer-named")


def test_waiting_ends_when_enough_was_accepted(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-waiting")
    waiting = actor.wait_sample.remote(step=0, groups=2, version=0, min_accepted=6, timeout_s=60)
    for index in range(2):
        call(actor.append, to_record_batch(make_group(index)))
    assert ray.wait([waiting], timeout=0.5)[0] == []
    call(actor.append, to_record_batch(make_group(2)))
    batch = ray.get(waiting, timeout=60)
    assert len(set(batch["group_id"].to_pylist())) == 2
    assert batch.num_rows == 4


def test_waiting_too_long_says_for_what(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-timeout")
    call(actor.append, to_record_batch(make_group(0)))
    with pytest.raises(TimeoutError, match=r"step 3 within 0.2 s: 2 of 8 trajectories accepted, 1 groups fresh"):
        call(actor.wait_sample, 3, 4, 0, 8, 0.2)
    with pytest.raises(TimeoutError, match=r"2 of 2 trajectories accepted, 0 groups fresh enough at version 999"):
        call(actor.wait_sample, 3, 4, 999, 2, 0.2)


def test_all_learners_get_the_same_batch_of_a_step(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-learners")
    for index in range(6):
        call(actor.append, to_record_batch(make_group(index)))
    first = call(actor.wait_sample, 4, 3, 0, 0, 10.0)
    call(actor.append, to_record_batch(make_group(6)))
    assert call(actor.wait_sample, 4, 3, 0, 0, 10.0).equals(first)
    assert not call(actor.wait_sample, 5, 3, 0, 0, 10.0).equals(first)
    assert call(actor.wait_sample, 4, 3, 0, 0, 10.0).equals(first)


def test_learners_get_the_same_batch_and_no_further_one_after_kill_9_of_the_actor(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-drawn")
    for index in range(6):
        call(actor.append, to_record_batch(make_group(index)))
    first = call(actor.wait_sample, 4, 3, 0, 0, 10.0)
    call(actor.append, to_record_batch(make_group(6)))
    os.kill(call(actor.stats)["pid"], signal.SIGKILL)
    assert call(actor.wait_sample, 4, 3, 0, 0, 10.0).equals(first)
    call(actor.close)
    os.kill(call(actor.stats)["pid"], signal.SIGKILL)
    assert call(actor.wait_sample, 5, 3, 0, 0, 10.0) is None
    assert call(actor.wait_sample, 4, 3, 0, 0, 10.0).equals(first)


def test_a_batch_has_fewer_groups_while_there_are_fewer(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-early")
    call(actor.append, to_record_batch(make_group(0)))
    assert call(actor.wait_sample, 0, 4, 0, 2, 10.0).num_rows == 2


def test_closing_ends_all_waiting(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-closed")
    waiting = actor.wait_sample.remote(step=0, groups=1, version=0, min_accepted=1, timeout_s=60)
    call(actor.close)
    assert ray.get(waiting, timeout=30) is None
    assert call(actor.wait_sample, 1, 1, 0, 0, 10.0) is None


def test_damaged_files_are_reported_at_start(tmp_path: Path) -> None:
    folder = tmp_path / "trajectories"
    folder.mkdir()
    (folder / "00000000.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"00000000\.parquet: not a readable trajectory file"):
        create_buffer_actor(RunConfig(), tmp_path, "buffer-damaged")


def test_a_refused_append_reaches_the_caller_as_a_user_error(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-refusing")
    (tmp_path / "trajectories").rmdir()
    with pytest.raises(UserError, match="cannot be written"):
        call(actor.append, to_record_batch(make_group(0)))
    assert call(actor.stats)["refused"] == 2


def test_after_kill_9_nothing_acknowledged_is_lost_or_doubled(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-killed")
    first = call(actor.stats)["pid"]
    acknowledged: list[str] = []
    waiting = actor.wait_sample.remote(step=5, groups=3, version=0, min_accepted=120, timeout_s=120)
    for index in range(20):
        acknowledged += call(actor.append, to_record_batch(make_group(index, 3))).trajectory_ids
    # Calls in flight when the process dies are repeated by Ray; ids make that harmless.
    in_flight = [actor.append.remote(to_record_batch(make_group(index, 3))) for index in range(20, 40)]
    os.kill(first, signal.SIGKILL)
    for reference in in_flight:
        acknowledged += ray.get(reference, timeout=120).trajectory_ids
    stats = call(actor.stats)
    assert stats["pid"] != first
    assert stats["accepted"] == len(set(acknowledged)) == 120
    assert stats["largest_group_index"] == 39
    sampled = ray.get(waiting, timeout=120)
    assert sampled.num_rows == 9
    again = call(actor.wait_sample, 5, 3, 0, 120, 10.0)
    assert again["trajectory_id"].to_pylist() == sampled["trajectory_id"].to_pylist()


def test_it_survives_being_killed_again_and_again(tmp_path: Path) -> None:
    actor = create_buffer_actor(RunConfig(), tmp_path, "buffer-mortal")
    for index in range(3):
        call(actor.append, to_record_batch(make_group(index)))
        os.kill(call(actor.stats)["pid"], signal.SIGKILL)
        time.sleep(0.2)
    assert call(actor.stats)["accepted"] == 6
