import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import (
    SCHEMA_VERSION_1,
    SCHEMA_VERSION_2,
    TRAJECTORY_SCHEMA,
    EndReason,
    Step,
    Trajectory,
    Validity,
    concatenate,
    from_arrow,
    python_values,
    read_parquet,
    to_record_batch,
    write_parquet,
)
from tests.shared.earlier_files import write_in_schema

STEP = Step(
    prompt="Reach the target.",
    image=0,
    response_ids=[4, 5, 6],
    response_text="{}",
    cot_end=1,
    action_end=2,
    sampler_log_probs=[-0.5, -0.25, 0.0],
    policy_version=3,
    action="+",
    validity=Validity.VALID,
    stop_ids=[7, 8],
)
TRAJECTORY = Trajectory(
    trajectory_id="t1",
    group_id="g1",
    instance_id="numberline/id/7",
    instance_seed=7,
    task="numberline",
    split="id",
    steps=[STEP, replace(STEP, action="[DONE]", policy_version=4)],
    images=[b"png"],
    log_rewards=[3.0, 4.6],
    original_rewards=[0.0, 1.0],
    end=EndReason.DONE,
    success=True,
    outcome="5",
    expert=False,
)
MALFORMED = replace(
    TRAJECTORY,
    trajectory_id="t2",
    steps=[replace(STEP, action=None, validity=Validity.MALFORMED)],
    original_rewards=[0.0],
    end=EndReason.INVALID,
    success=False,
)


def test_trajectories_come_back_from_arrow_as_they_were():
    batch = to_record_batch([TRAJECTORY, MALFORMED])
    assert batch.schema.equals(TRAJECTORY_SCHEMA)
    assert from_arrow(batch) == [TRAJECTORY, MALFORMED]


def test_trajectories_come_back_from_parquet_as_they_were(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet([TRAJECTORY, MALFORMED], path)
    assert from_arrow(read_parquet(path)) == [TRAJECTORY, MALFORMED]
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_values_are_those_of_arrow_whatever_part_of_a_batch_is_asked_for():
    batch = to_record_batch(
        [
            TRAJECTORY,
            MALFORMED,
            replace(TRAJECTORY, steps=[], images=[], original_rewards=[], log_rewards=[0.5], end=EndReason.STEP_LIMIT),
        ]
        * 3
    )
    for part in (batch, batch.slice(1, 4), batch.slice(5), batch.slice(2, 0), batch.take(pa.array([7, 2, 1]))):
        array = part.to_struct_array()
        assert python_values(array) == array.to_pylist()


def test_an_expert_s_missing_log_probabilities_come_back_as_not_a_number():
    expert = replace(TRAJECTORY, steps=[replace(STEP, sampler_log_probs=[math.nan] * 3)] * 2)
    (back,) = from_arrow(to_record_batch([expert]))
    assert all(math.isnan(p) for step in back.steps for p in step.sampler_log_probs)


@pytest.mark.parametrize("schema", [SCHEMA_VERSION_1, SCHEMA_VERSION_2], ids=["1", "2"])
def test_files_of_earlier_schemas_are_read_as_those_of_today(schema, tmp_path):
    path = write_in_schema([TRAJECTORY, MALFORMED], schema, tmp_path / "old.parquet")
    table = read_parquet(path)
    assert table.schema.equals(TRAJECTORY_SCHEMA)
    moved, stopped = TRAJECTORY.steps
    # Nothing was written of the stop action but where it was played.
    steps = [replace(moved, stop_ids=[]), replace(stopped, stop_ids=stopped.response_ids[1:2])]
    malformed = replace(MALFORMED, steps=[replace(MALFORMED.steps[0], stop_ids=[])])
    assert from_arrow(table) == [replace(TRAJECTORY, steps=steps), malformed]
    assert read_parquet(path, ["images", "trajectory_id"]).num_columns == 2


def test_pictures_and_texts_have_offsets_for_more_than_two_gib():
    step = TRAJECTORY_SCHEMA.field("steps").type.value_type
    long = [TRAJECTORY_SCHEMA.field("images").type.value_type, step.field("prompt").type]
    assert [*long, step.field("response_text").type] == [pa.large_binary(), pa.large_string(), pa.large_string()]


@pytest.mark.slow
def test_more_than_two_gib_of_pictures_become_one_batch():
    """2.1 GiB of memory: the pictures stand there once, and once more where they are put together."""
    picture = to_record_batch([replace(TRAJECTORY, images=[bytes(64 * 2**20)])])
    together = concatenate([picture] * 33)
    assert (together.num_rows, together.nbytes > 2**31) == (33, True)
    assert together["images"][32][0].as_buffer().size == 64 * 2**20


def test_a_stopped_trajectory_has_one_step_more_than_transitions():
    assert TRAJECTORY.length == 1
    assert TRAJECTORY.oldest_version == 3
    assert TRAJECTORY.actions == ("+", "[DONE]")
    with pytest.raises(ValueError, match="do not fit"):
        replace(TRAJECTORY, end=EndReason.STEP_LIMIT)
    with pytest.raises(ValueError, match="original reward"):
        replace(TRAJECTORY, original_rewards=[0.0])


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"damaged\.parquet"):
        read_parquet(damaged)
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(UserError, match="trajectory schema"):
        read_parquet(foreign)
