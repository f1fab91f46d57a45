"""Puts the page together. Every text of a run is untrusted: it is escaped here, or shown by the script as text only.

Nothing is loaded from elsewhere. The page's policy allows its own style sheet and its own script by their hashes
and `data:` pictures, nothing else, so that a text that got past the escaping would still not be run.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from gflowvlm.run.log import Row
from gflowvlm.shared.config import RunConfig
from gflowvlm.studies.report.curves import draw, panels
from gflowvlm.studies.report.selection import Selection
from gflowvlm.studies.report.tables import configuration, evaluations, events, final_report, overview, step_summary
from gflowvlm.studies.report.trajectory_data import Pictures


def write_page(
    name: str,
    config: RunConfig,
    rows: Sequence[Row],
    summary: dict[str, Any] | None,
    selection: Selection,
    trajectories: dict[str, Any],
    pictures: Pictures,
) -> str:
    """Returns the page as HTML.

    Args:
        name: Name of the run's folder.
        config: The run's configuration.
        rows: The run's log (`read_rows`).
        summary: The run's summary, None while it is not finished.
        selection: The trajectories that are shown, for how they were chosen.
        trajectories: What the script shows (`trajectory_data`).
        pictures: The pictures that `trajectories` refers to.
    """
    style, script = _own("page.css"), _own("page.js")
    left_out = f" {pictures.left_out} pictures found no room and are left out." if pictures.left_out > 0 else ""
    return Template(_own("page.html")).substitute(
        policy=(
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        style=style,
        script=script,
        title=escape(name),
        overview=overview(config, rows, summary),
        events=events(rows),
        final_report=final_report(summary, config.task.name),
        curves="".join(draw(panel) for panel in panels(rows)) or "<p>The log holds no figures yet.</p>",
        evaluations=evaluations(rows),
        step_summary=step_summary(rows),
        rule=escape(selection.rule + left_out),
        configuration=configuration(config),
        pictures=embedded_json(pictures.uris),
        data=packed_json(trajectories),
    )


def embedded_json(content: Any) -> str:
    """Returns JSON that can stand in a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def packed_json(content: Any) -> str:
    """Returns JSON as gzip in base64: prompts with a history repeat each other, and pack to a fraction.

    Base64 has no character that could end the script element it stands in.
    """
    # ASCII: a response may hold half a surrogate pair, which no encoding takes.
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _own(name: str) -> str:
    return files("gflowvlm.studies.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
