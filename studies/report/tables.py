"""The tables of the page. Every value goes through `escape`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

from gflowvlm.run.final_report import before_and_after, measured_on
from gflowvlm.run.log import Row
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.metrics import EVALUATION_METRICS, STEP_METRICS
from gflowvlm.shared.trajectory import BASE_VERSION

_SPLITS = {"id": "in distribution", "ood": "out of distribution"}

_MISSING = "–"


def overview(config: RunConfig, rows: Sequence[Row], summary: Mapping[str, Any] | None) -> str:
    """Returns the figures that say what the run is and how far it came."""
    done = max((row["step"] for row in rows if row["kind"] == "step"), default=0)
    played = max((row["env_steps"] for row in rows if row["kind"] == "rollout"), default=None)
    items = {
        "Task": config.task.name,
        "Loss": config.objective.loss,
        "Model": config.policy.model,
        "Seed": config.seed,
        "Learner steps": f"{done} of {config.learner.steps}",
        "Environment steps": played,
        "State": "running or stopped" if summary is None else "finished",
    }
    if summary is not None:
        wall, memory = summary.get("wall_s"), summary.get("peak_memory_gib")
        items |= {
            "Best adapter version": summary.get("version"),
            "Wall time": None if wall is None else f"{wall / 60:.1f} min",
            "Peak memory": None if memory is None else f"{memory:.1f} GiB",
        }
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{_shown(value)}</dd></div>" for name, value in items.items())


def events(rows: Iterable[Row]) -> str:
    """Returns restarts of the learner and what ended the run, nothing where all went well."""
    said = []
    starts = [row for row in rows if row["kind"] == "learner"]
    for row in starts[1:]:
        said.append(f"The learner was restarted after step {row['step']}.")
    for row in rows:
        if row["kind"] == "fatal":
            said.append("The run could not go on: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "kind"))
    return "".join(f'<p class="event">{escape(text)}</p>' for text in said)


def final_report(summary: Mapping[str, Any] | None, task: str) -> str:
    """Returns the final report: every figure before and after training, in and out of distribution."""
    reports = [] if summary is None else list(summary.get("report", []))
    if summary is None or len(reports) == 0:
        return "<p>The run has no final report yet: it is made when training ends.</p>"
    by_split = before_and_after(reports, summary.get("version"))
    heads = [f"{_SPLITS.get(split, split)}, {when}" for split in by_split for when in ("before", "after")]
    lines = []
    for metric in EVALUATION_METRICS:
        cells = [None if row is None else row.get(metric.name) for played in by_split.values() for row in played]
        if any(cell is not None for cell in cells):
            lines.append([_described(metric.name, metric.description, metric.unit), *map(_shown, cells)])
    first = reports[0]
    best = summary.get("version", _MISSING)
    after = "the base model too, as no adapter evaluated better" if best == BASE_VERSION else f"adapter version {best}"
    said = (
        f"{first['instances']} instances, {first['samples']} trajectories each at temperature 1, "
        f"on {measured_on([task])}; before: the base model, after: {after}."
    )
    return _table(["figure", *heads], lines, numbers_from=1) + f'<p class="note">{escape(said)}</p>'


def evaluations(rows: Iterable[Row]) -> str:
    """Returns the evaluations that were made while the run trained."""
    made = [row for row in rows if row["kind"] == "evaluation"]
    if len(made) == 0:
        return "<p>No evaluation yet.</p>"
    names = [
        "success",
        "success_greedy",
        "success_bound",
        "div_at_n",
        "total_variation",
        "total_variation_floor",
        "malformed_rate",
        "inadmissible_rate",
        "mean_response_tokens",
    ]
    lines = [
        [_shown(row["step"]), _shown(row["version"]), _shown(row["split"]), *(_shown(row.get(name)) for name in names)]
        for row in made
    ]
    return _table(["step", "version", "split", *(name.replace("_", " ") for name in names)], lines, numbers_from=3)


def step_summary(rows: Iterable[Row]) -> str:
    """Returns every figure of the learner steps: its start, its end, its range."""
    steps = [row for row in rows if row["kind"] == "step"]
    if len(steps) == 0:
        return "<p>No learner step yet.</p>"
    tenth = max(1, len(steps) // 10)
    lines = []
    for metric in STEP_METRICS:
        values = _finite(row.get(metric.name) for row in steps)
        if len(values) > 0 and metric.name not in ("step", "version"):
            figures = (mean(values[:tenth]), mean(values[-tenth:]), mean(values), min(values), max(values))
            lines.append([_described(metric.name, metric.description, metric.unit), *map(_shown, figures)])
    heads = ["figure", f"first {tenth} steps", f"last {tenth} steps", "mean", "least", "most"]
    return _table(heads, lines, numbers_from=1)


def configuration(config: RunConfig) -> str:
    """Returns every setting with its value; those that differ from the defaults are marked."""
    values = _flat(config.model_dump(mode="json"))
    # The defaults of the run's own task: another task's settings have other names.
    plain = RunConfig.model_validate({"task": {"name": config.task.name}})
    defaults = _flat(plain.model_dump(mode="json"))
    lines = []
    for name, value in values.items():
        changed = name not in defaults or defaults[name] != value
        setting = f"<code>{escape(name)}</code>"
        usual = f'<span class="note">{_setting(defaults.get(name))}</span>'
        lines.append([setting, f"<b>{_setting(value)}</b>" if changed else _setting(value), usual if changed else ""])
    return _table(["setting", "value", "default, where it differs"], lines)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """Returns a table; heads are escaped here, cells are HTML already."""

    def kind(column: int) -> str:
        return ' class="number"' if numbers_from is not None and column >= numbers_from else ""

    head = "".join(f'<th scope="col"{kind(at)}>{escape(name)}</th>' for at, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(at)}>{cell}</td>" for at, cell in enumerate(line)) + "</tr>" for line in lines
    )
    # A region that scrolls sideways has to be reachable by keyboard.
    return (
        f'<div class="scrolls" tabindex="0" role="region" aria-label="table: {escape(heads[0])}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _described(name: str, description: str, unit: str) -> str:
    return f'{escape(description)}<br><code>{escape(name)}</code> <span class="note">{escape(unit)}</span>'


def _shown(value: object) -> str:
    if value is None:
        return _MISSING
    if isinstance(value, float):
        if not math.isfinite(value):
            return escape(str(value))
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.0f}" if value == int(value) else f"{value:.3g}"
    return escape(str(value))


def _setting(value: object) -> str:
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _finite(values: Iterable[object]) -> list[float]:
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
