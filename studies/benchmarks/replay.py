"""How fast the replay buffer takes and gives trajectories, in this process and as a Ray actor."""

import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from gflowvlm.actors.buffer_actor import create_buffer_actor
from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import from_arrow, to_record_batch
from gflowvlm.studies.benchmarks.measurement import Measurement, Say, Scale
from gflowvlm.studies.benchmarks.workload import copied_groups, made_groups

PART = "replay"
ANSWER_TIMEOUT_S = 60.0
_DIFFERENT_GROUPS = 16


def bench_replay(config: RunConfig, model_path: str, scale: Scale, say: Say) -> list[Measurement]:
    """Appends groups one by one, then samples batches of the run's size; needs a connected Ray."""
    say(f"making {scale.replay_groups} groups of {config.rollout.group_size} trajectories")
    inputs = PolicyInputs.load(model_path, config.task.answer_format)
    groups = copied_groups(made_groups(config, inputs, _DIFFERENT_GROUPS), scale.replay_groups)
    batches = [to_record_batch(group) for group in groups]
    # Only now, when Arrow has loaded what it loads at its first use.
    measurements = _rates("replay_to_arrow", "from trajectories, one group at a time", to_record_batch, batches, groups)
    whole = pa.Table.from_batches(batches)
    measurements += _rates("replay_from_arrow", "to trajectories, all groups at once", from_arrow, batches, [whole])
    with tempfile.TemporaryDirectory(prefix="gflowvlm-bench-") as folder:
        say(f"appending and sampling in this process, files in {folder}")
        buffer = ReplayBuffer(config.replay, config.seed, Path(folder) / "pure")
        measurements += _rates(
            "replay_append", "one group a call, on disk before the call returns", buffer.append, batches
        )
        measurements += _sample_rates("replay_sample", config, scale, "in this process", buffer.sample)

        say("appending and sampling through the Ray actor")
        actor = create_buffer_actor(config, Path(folder) / "actor", f"bench-{uuid.uuid4().hex[:8]}")

        def append(batch: pa.RecordBatch) -> object:
            return ray.get(actor.append.remote(batch), timeout=ANSWER_TIMEOUT_S)

        def sample(step: int, groups: int, version: int) -> pa.RecordBatch:
            answer = actor.wait_sample.remote(step, groups, version, min_accepted=0, timeout_s=ANSWER_TIMEOUT_S)
            return ray.get(answer, timeout=ANSWER_TIMEOUT_S)

        def append_all(together: list[pa.RecordBatch]) -> object:
            return ray.get([actor.append.remote(batch) for batch in together], timeout=ANSWER_TIMEOUT_S)

        try:
            # The second half comes all at once, as from many workers.
            half = len(batches) // 2
            measurements += _rates("replay_actor_append", "the same through Ray, one client", append, batches[:half])
            many = batches[half:]
            measurements += _rates(
                "replay_actor_append_together", f"{len(many)} such calls at once", append_all, many, [many]
            )
            measurements += _sample_rates("replay_actor_sample", config, scale, "through Ray, one client", sample)
        finally:
            ray.kill(actor)
    return measurements


def _rates(
    name: str,
    what: str,
    call: Callable[[Any], object],
    batches: list[pa.RecordBatch],
    arguments: Sequence[object] | None = None,
) -> list[Measurement]:
    """Times calls with each of the arguments, by default with each batch; all of them are as much as `batches`."""
    started = time.perf_counter()
    for argument in batches if arguments is None else arguments:
        call(argument)
    elapsed = time.perf_counter() - started
    return _measurements(name, what, sum(b.num_rows for b in batches), sum(b.nbytes for b in batches), elapsed)


def _sample_rates(
    name: str, config: RunConfig, scale: Scale, where: str, sample: Callable[[int, int, int], pa.RecordBatch]
) -> list[Measurement]:
    groups, step, rows, size = config.groups_per_batch, 0, 0, 0
    started = time.perf_counter()
    while time.perf_counter() - started < scale.seconds / 2:
        batch = sample(step, groups, 0)
        step, rows, size = step + 1, rows + batch.num_rows, size + batch.nbytes
    elapsed = time.perf_counter() - started
    return _measurements(name, f"batches of {groups} groups out of {scale.replay_groups}, {where}", rows, size, elapsed)


def _measurements(name: str, what: str, rows: int, size: int, elapsed: float) -> list[Measurement]:
    return [
        Measurement(PART, f"{name}_trajectories_per_s", rows / elapsed, "trajectories/s", what),
        Measurement(PART, f"{name}_mb_per_s", size / elapsed / 1e6, "MB/s", f"Arrow bytes; {what}"),
    ]
