"""The table of what a check found."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from gflowvlm.shared.findings import Check, Status

COLOURS = {Status.OK: "green", Status.NOTE: "yellow", Status.BROKEN: "red"}


def check_table(checks: Sequence[Check]) -> Table:
    """Returns the findings as a table, a row each."""
    table = Table("check", "", "finding", "what to do")
    for check in checks:
        table.add_row(check.name, Text(check.status.value, COLOURS[check.status]), Text(check.detail), check.advice)
    return table
