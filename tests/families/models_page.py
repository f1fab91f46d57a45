"""Writes docs/models.md from what the matrix saw."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.families.factory import FAMILIES
from tests.families.matrix import STEPS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"

Seen = Mapping[str, Mapping[str, Mapping[str, Any] | None]]


def table(seen: Seen) -> str:
    """Returns the table, and below it why what failed did."""
    heads = ["family", *(column.heading for column in STEPS.values())]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    reasons = []
    for name, family in FAMILIES.items():
        cells = []
        for step, column in STEPS.items():
            found = seen[name][step]
            cells.append(_cell(found))
            if found is not None and not found["passed"]:
                reasons.append(f"* {family.label}, {column.heading}: {_plain(str(found['said']))}")
        lines.append(f"| {family.label} | {' | '.join(cells)} |")
    passed = sum(all(found is not None and found["passed"] for found in seen[name].values()) for name in FAMILIES)
    told = [f"{passed} of {len(FAMILIES)} families pass every column."]
    if reasons:
        told += ["", "What failed, in the words of the last error:", "", *reasons]
    return "\n".join([*lines, "", *told, ""])


def write_page(seen: Seen) -> None:
    """Puts the table into the page, between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table(seen)}{END}{behind}", encoding="utf-8")


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not tried"
    if not found["passed"]:
        return f"**fails** {found['said']}" if re.fullmatch(r"[\d.e+/ -]+", str(found["said"])) else "**fails**"
    return str(found["said"]) or "passes"


def _plain(said: str) -> str:
    """Returns an error without the folders of the machine that it was seen on."""
    return re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", said).replace("|", "\\|").replace("<", "\\<") or "no message"
