"""The trajectory schema: what rollout workers write, the replay buffer stores and the learner reads.

One trajectory is one row. With n non-stop transitions the visited states are 0..n, so there are n + 1
log-rewards. It has n + 1 steps (responses) when the policy chose to stop, n otherwise.
Images are stored once per trajectory as encoded bytes; steps refer to them by index.

Pictures and texts have 64-bit offsets: with 32 bits a batch could hold 2 GiB of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gflowvlm.shared.errors import UserError
from gflowvlm.shared.response import DONE_TOKEN

SCHEMA_VERSION = 3

BASE_VERSION = 0
"""The policy version that is the base model without an adapter."""


class Validity(StrEnum):
    """What became of a response."""

    VALID = "valid"
    MALFORMED = "malformed"
    INADMISSIBLE = "inadmissible"


class EndReason(StrEnum):
    """Why a trajectory ended."""

    DONE = "done"
    """The policy chose the stop action."""
    ENVIRONMENT = "environment"
    """The environment ended the episode: stopping was the only move."""
    INVALID = "invalid"
    """A malformed or inadmissible response ended the episode at the reward floor."""
    STEP_LIMIT = "step_limit"
    """Cut off: the trajectory is incomplete (`truncation` says how losses treat it)."""
    RESPONSE_CUT = "response_cut"
    """A limit of tokens (``policy.max_response_tokens``, ``sampler.max_model_len``) cut the next response off before
    its action. What there was of it is not recorded; the trajectory is incomplete, whatever `truncation` says."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The next prompt left no room for a response in ``sampler.max_model_len``; incomplete in the same way."""

    @property
    def by_token_limit(self) -> bool:
        """Whether a limit of tokens cut the trajectory off: neither the policy nor the environment ended it."""
        return self in (EndReason.RESPONSE_CUT, EndReason.PROMPT_TOO_LONG)


@dataclass(frozen=True)
class Step:
    """One response of the policy at one visited state.

    Attributes:
        prompt: The task's prompt at this state, before any chat template.
        image: Index into the trajectory's images.
        response_ids: Response tokens exactly as sampled, end token included when it was sampled.
        response_text: Their text, special tokens kept.
        cot_end: Tokens ``[0, cot_end)`` are chain of thought.
        action_end: Tokens ``[cot_end, action_end)`` are the action with what ends it; empty when malformed.
        sampler_log_probs: The sampler's log-probability of each token (nats, temperature 1); NaN for
            tokens that were not sampled (expert demonstrations, forced exploration).
        policy_version: Adapter version that answered; 0 is the base model; -1 for the expert.
        action: The parsed action, or None when malformed.
        validity: Whether the response could be read and its action was admissible.
        stop_ids: The tokens of the stop action behind ``response_ids[:cot_end]``; the action's own where it stops,
            empty where stopping cannot be scored. See `ResponseLayout`.
    """

    prompt: str
    image: int
    response_ids: list[int]
    response_text: str
    cot_end: int
    action_end: int
    sampler_log_probs: list[float]
    policy_version: int
    action: str | None
    validity: Validity
    stop_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    Attributes:
        trajectory_id: Globally unique; what makes a repeated append harmless.
        group_id: Trajectories of one group are rollouts of one instance, made together.
        instance_id: ``task/split/seed``: everything that fixes the partition function Z(g).
        instance_seed: Seed of the environment's `reset`.
        task: Name of the task.
        split: ``id`` or ``ood``.
        steps: The responses, in order.
        images: Encoded images (PNG), each once.
        log_rewards: log R(z_t ⊤) in nats at every visited state 0..n, floored, before the exponent β.
        original_rewards: The task's own reward of every step (the PPO baseline's).
        end: Why the episode ended.
        success: Whether the final state solves the task.
        outcome: Name of the final outcome (what the distribution match is measured over).
        expert: Whether the expert, not the policy, made it.

    Example:
        >>> trajectory = gflowvlm.Run(path).trajectories(success=True, expert=False).newest(1)[0]
        >>> trajectory.actions[-1]  # the last response's, the stop action
        '[DONE]'
        >>> len(trajectory.log_rewards) == trajectory.length + 1
        True
    """

    trajectory_id: str
    group_id: str
    instance_id: str
    instance_seed: int
    task: str
    split: str
    steps: list[Step]
    images: list[bytes]
    log_rewards: list[float]
    original_rewards: list[float]
    end: EndReason
    success: bool
    outcome: str
    expert: bool

    def __post_init__(self) -> None:
        expected = len(self.log_rewards) - 1 + (self.end is EndReason.DONE)
        if len(self.log_rewards) == 0 or len(self.steps) != expected:
            raise ValueError(
                f"trajectory {self.trajectory_id}: {len(self.steps)} steps do not fit "
                f"{len(self.log_rewards)} log-rewards and end {self.end.value!r}"
            )
        if len(self.original_rewards) != len(self.steps):
            raise ValueError(f"trajectory {self.trajectory_id}: one original reward per step is needed")

    @property
    def length(self) -> int:
        """n, the number of non-stop transitions."""
        return len(self.log_rewards) - 1

    @property
    def actions(self) -> tuple[str | None, ...]:
        """The parsed actions, the stop action included."""
        return tuple(step.action for step in self.steps)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that made a step of it (-1 for the expert or without steps)."""
        return min((step.policy_version for step in self.steps), default=-1)

    @property
    def response_tokens(self) -> int:
        """Number of response tokens in all steps."""
        return sum(len(step.response_ids) for step in self.steps)


STEP_TYPE = pa.struct(
    [
        pa.field("prompt", pa.large_string(), nullable=False),
        pa.field("image", pa.int32(), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_text", pa.large_string(), nullable=False),
        pa.field("cot_end", pa.int32(), nullable=False),
        pa.field("action_end", pa.int32(), nullable=False),
        pa.field("sampler_log_probs", pa.list_(pa.float32()), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("action", pa.string()),
        pa.field("validity", pa.string(), nullable=False),
        # Null in what is read of earlier versions, which had none.
        pa.field("stop_ids", pa.list_(pa.int32())),
    ]
)

TRAJECTORY_SCHEMA = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("instance_id", pa.string(), nullable=False),
        pa.field("instance_seed", pa.int64(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("steps", pa.list_(STEP_TYPE), nullable=False),
        pa.field("images", pa.list_(pa.large_binary()), nullable=False),
        pa.field("log_rewards", pa.list_(pa.float64()), nullable=False),
        pa.field("original_rewards", pa.list_(pa.float64()), nullable=False),
        pa.field("end", pa.string(), nullable=False),
        pa.field("success", pa.bool_(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("expert", pa.bool_(), nullable=False),
    ],
    metadata={"gflowvlm.schema_version": str(SCHEMA_VERSION)},
)


def is_trajectory_schema(found: pa.Schema) -> bool:
    """Whether a file of this schema can be read as trajectories: today's, or that of an earlier version."""
    return any(found.equals(known) for known in (TRAJECTORY_SCHEMA, SCHEMA_VERSION_2, SCHEMA_VERSION_1))


def _with_short_offsets(kind: pa.DataType) -> pa.DataType:
    """Returns a type of the schema as version 1 had it."""
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([field.with_type(_with_short_offsets(field.type)) for field in fields])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_short_offsets(kind.value_type)))
    return {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}.get(kind, kind)


SCHEMA_VERSION_2 = TRAJECTORY_SCHEMA.set(
    TRAJECTORY_SCHEMA.get_field_index("steps"),
    pa.field(
        "steps",
        pa.list_(pa.struct([column for column in STEP_TYPE if column.name != "stop_ids"])),
        nullable=False,
    ),
)
"""The schema of version 2, which had no `stop_ids`; its files are read, too."""

SCHEMA_VERSION_1 = pa.schema([field.with_type(_with_short_offsets(field.type)) for field in SCHEMA_VERSION_2])
"""The schema of version 1, with 32-bit offsets; its files are read, too."""


def to_record_batch(trajectories: Sequence[Trajectory]) -> pa.RecordBatch:
    """Returns the trajectories as one Arrow record batch of `TRAJECTORY_SCHEMA`."""
    # Not `asdict`, which copies every token.
    rows = [{**vars(t), "steps": [vars(step) for step in t.steps]} for t in trajectories]
    return pa.RecordBatch.from_pylist(rows, schema=TRAJECTORY_SCHEMA)


def from_arrow(data: pa.RecordBatch | pa.Table) -> list[Trajectory]:
    """Returns the trajectories of a record batch or table of `TRAJECTORY_SCHEMA`."""
    batches = [data] if isinstance(data, pa.RecordBatch) else data.to_batches()
    return [_from_row(row) for batch in batches for row in python_values(batch.to_struct_array())]


def _from_row(row: dict[str, Any]) -> Trajectory:
    return Trajectory(**{**row, "steps": [_step(step) for step in row["steps"]], "end": EndReason(row["end"])})


def _step(values: dict[str, Any]) -> Step:
    stop_ids = values["stop_ids"]
    if stop_ids is None:
        # Of an earlier version: the tokens of a stop are known where it was played.
        stopped = values["action"] == DONE_TOKEN
        stop_ids = values["response_ids"][values["cot_end"] : values["action_end"]] if stopped else []
    return Step(**{**values, "validity": Validity(values["validity"]), "stop_ids": stop_ids})


def concatenate(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Returns the rows of several record batches of `TRAJECTORY_SCHEMA` as one, a copy."""
    merged = pa.Table.from_batches(batches, schema=TRAJECTORY_SCHEMA).combine_chunks().to_batches()
    return merged[0] if len(merged) > 0 else pa.RecordBatch.from_pylist([], schema=TRAJECTORY_SCHEMA)


def python_values(array: pa.Array) -> list[Any]:
    """Returns what `array.to_pylist` does, without a Python object for every number on the way.

    A learner's batch has some hundred thousand tokens, and the learner waits for them.
    """
    kind = array.type
    if array.null_count > 0:
        return list(array.to_pylist())
    if pa.types.is_list(kind):
        values, offsets = python_values(array.flatten()), array.offsets.to_numpy()
        return [values[start:end] for start, end in pairwise((offsets - offsets[0]).tolist())]
    if pa.types.is_struct(kind):
        columns = [python_values(column) for column in array.flatten()]
        names = [kind.field(index).name for index in range(kind.num_fields)]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return list(array.to_numpy(zero_copy_only=False).tolist())
    return list(array.to_pylist())


def write_parquet(trajectories: Iterable[Trajectory] | pa.RecordBatch | pa.Table, path: Path) -> None:
    """Writes trajectories to one Parquet file, atomically: a reader sees the whole file or none."""
    if isinstance(trajectories, pa.Table):
        table = trajectories
    elif isinstance(trajectories, pa.RecordBatch):
        table = pa.Table.from_batches([trajectories])
    else:
        table = pa.Table.from_batches([to_record_batch(list(trajectories))])
    partial = path.with_name(path.name + ".partial")
    with pa.OSFile(str(partial), "wb") as sink:
        pq.write_table(table, sink, compression="zstd")
    partial.replace(path)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the table of one trajectory file.

    Args:
        path: The file.
        columns: Names of the columns wanted; all of them by default.

    Raises:
        UserError: The file cannot be read, or holds something other than trajectories.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = None
            if is_trajectory_schema(file.schema_arrow):
                table = file.read(None if columns is None else list(columns))
                # The columns are in the file's order.
                table = table.cast(pa.schema([TRAJECTORY_SCHEMA.field(name) for name in table.column_names]))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable trajectory file ({error}); remove or restore it") from None
    if table is None:
        raise UserError(f"{path}: not in the trajectory schema version {SCHEMA_VERSION}; made by another release?")
    return table


def read_trajectories(path: Path) -> list[Trajectory]:
    """Returns the trajectories of one file.

    Raises:
        UserError: The file cannot be read, or holds something other than trajectories.
    """
    table = read_parquet(path)
    try:
        return from_arrow(table)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: holds what is no trajectory ({error}); remove or restore it") from None
