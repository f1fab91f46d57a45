"""Pieces of the tables that sum up several runs or trainings."""

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any


def spread(values: Sequence[float], digits: int) -> str:
    """Returns ``mean ± standard deviation``, the mean alone of one value, ``-`` of nothing."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV after a line of their names, in the order in which they first come up."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
