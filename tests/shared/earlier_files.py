"""Trajectory files as earlier versions of the schema had them."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gflowvlm.shared.trajectory import Trajectory


def write_in_schema(trajectories: Sequence[Trajectory], schema: pa.Schema, path: Path) -> Path:
    """Writes trajectories in an earlier schema; what it has no place for is left out."""
    columns = {field.name for field in schema.field("steps").type.value_type}
    rows = [
        {**vars(t), "steps": [{k: v for k, v in vars(step).items() if k in columns} for step in t.steps]}
        for t in trajectories
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path
