"""Curves of a run's log as SVG, without a script and without anything from elsewhere."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from gflowvlm.run.log import Row

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 10, 36
_TICKS = 5
_AT_STEP, _BY_ENV = "learner step", "environment steps played"

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: Its name in the legend.
        points: x and y, finite.
        style: CSS class: colour, dashes, and whether the points are marked.
        marked: Whether the points are drawn.
    """

    label: str
    points: Sequence[Point]
    style: str
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        title: What it shows.
        x_label: Name of the x axis.
        y_label: Name and unit of the y axis.
        curves: Its lines.
        logarithmic: Whether the y axis is; points that are not positive are then left out.
        top: Upper end of the y axis, None: that of the data.
        from_zero: Whether the y axis starts at 0.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    top: float | None = None
    from_zero: bool = False


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Returns the diagrams that a run's log has data for."""
    curves = _LoggedCurves(rows)
    made = [*_policy_panels(curves), *_training_panels(curves), *_rollout_panels(curves)]
    return [panel for panel in made if any(len(curve.points) > 0 for curve in panel.curves)]


class _LoggedCurves:
    """Curves of the rows of one kind each."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.samples = next((row["samples"] for row in rows if row["kind"] == "evaluation"), "N")

    def of_steps(self, label: str, key: str, style: str) -> Curve:
        return Curve(label, _points(self._rows, "step", key), style)

    def of_evaluations(self, label: str, key: str, style: str, *, marked: bool = True) -> Curve:
        return Curve(label, _points(self._rows, "evaluation", key, only=lambda r: r["split"] == "id"), style, marked)

    def of_rollouts(self, label: str, key: str, style: str) -> Curve:
        return Curve(label, _points(self._rows, "rollout", key, x="env_steps"), style)


def _policy_panels(curves: _LoggedCurves) -> list[Panel]:
    """How good the policy is."""
    evaluated = curves.of_evaluations
    return [
        Panel(
            "Success",
            _AT_STEP,
            "share of trajectories",
            [
                curves.of_steps("training batches", "batch_success", "grey"),
                evaluated("evaluation, temperature 1", "success", "blue"),
                evaluated("evaluation, greedy", "success_greedy", "orange dashed"),
                evaluated("perfect sampler of the target", "success_bound", "black dotted", marked=False),
            ],
            top=1.0,
            from_zero=True,
        ),
        Panel(
            f"Diversity: Div@{curves.samples}",
            _AT_STEP,
            "distinct solutions",
            [evaluated("distinct solutions of a solved instance", "div_at_n", "green")],
            from_zero=True,
        ),
        Panel(
            "Distance to the target R^β / Z",
            _AT_STEP,
            "total variation",
            [
                evaluated("total variation of outcomes", "total_variation", "red"),
                evaluated("95 % interval, lower end", "total_variation_low", "red dotted", marked=False),
                evaluated("upper end", "total_variation_high", "red dotted", marked=False),
                evaluated("noise floor of a perfect policy", "total_variation_floor", "black dotted", marked=False),
            ],
            top=1.0,
            from_zero=True,
        ),
    ]


def _training_panels(curves: _LoggedCurves) -> list[Panel]:
    """What the learner's steps are like."""
    of_steps = curves.of_steps
    loss = of_steps("loss", "loss", "blue")
    return [
        # The baselines' loss may be negative.
        Panel("Loss", _AT_STEP, "loss", [loss], logarithmic=all(value > 0 for _, value in loss.points)),
        Panel("Log-probability of a transition", _AT_STEP, "nats", [of_steps("mean log P_F", "log_pf_mean", "purple")]),
        Panel("Partition function", _AT_STEP, "nats", [of_steps("mean log Z of the batch", "log_z", "green")]),
        Panel(
            "Gradient norm",
            _AT_STEP,
            "norm",
            [of_steps("adapter", "grad_norm", "blue"), of_steps("head", "head_grad_norm", "orange dashed")],
            logarithmic=True,
        ),
        Panel(
            "Age of the training data",
            _AT_STEP,
            "adapter versions",
            [of_steps("mean", "staleness_mean", "blue"), of_steps("oldest", "staleness_max", "orange dashed")],
            from_zero=True,
        ),
    ]


def _rollout_panels(curves: _LoggedCurves) -> list[Panel]:
    """What is played, how fast, and in how much memory."""
    played = curves.of_rollouts
    return [
        Panel(
            "Success while playing",
            _BY_ENV,
            "share of the newest rollouts",
            [
                played("successful", "rollout_success", "blue"),
                played("ended by an invalid response", "rollout_invalid", "red dashed"),
            ],
            top=1.0,
            from_zero=True,
        ),
        Panel(
            "Length of an episode",
            _BY_ENV,
            "transitions",
            [played("newest rollouts, mean", "rollout_length", "purple")],
            from_zero=True,
        ),
        Panel(
            "Sampling",
            _BY_ENV,
            "response tokens / s",
            [played("since the start", "tokens_per_s", "green")],
            from_zero=True,
        ),
        Panel("Memory of the run", _BY_ENV, "GiB", [played("all processes", "memory_gib", "grey")], from_zero=True),
    ]


def draw(panel: Panel) -> str:
    """Returns a panel as an HTML figure: SVG, and a legend of the curves that have points."""
    curves = [_drawable(curve) if panel.logarithmic else curve for curve in panel.curves]
    curves = [curve for curve in curves if len(curve.points) > 0]
    if len(curves) == 0:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_low, x_high = _widened(min(xs), max(xs))
    if panel.logarithmic:
        y_low = float(math.floor(math.log10(min(ys))))
        y_high = max(float(math.ceil(math.log10(max(ys)))), y_low + 1)
    else:
        y_low, y_high = _widened(0.0 if panel.from_zero else min(ys), max(ys) if panel.top is None else panel.top)

    def to_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def to_y(y: float) -> float:
        value = math.log10(y) if panel.logarithmic else y
        return HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    if panel.logarithmic:
        every = max(1, math.ceil((y_high - y_low) / _TICKS))
        y_ticks = [10.0**power for power in range(int(y_low), int(y_high) + 1, every)]
    else:
        y_ticks = _ticks(y_low, y_high)
    parts = [*_axes(panel, _ticks(x_low, x_high), y_ticks, to_x, to_y)]
    for curve in curves:
        parts += _line(curve, to_x, to_y)
    described = "; ".join(f"{c.label}: from {_number(c.points[0][1])} to {_number(c.points[-1][1])}" for c in curves)
    legend = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line class="curve {curve.style}" x1="1" y1="5" x2="25" '
        f'y2="5"/></svg>{escape(curve.label)} <b>{_number(curve.points[-1][1])}</b></li>'
        for curve in curves
    )
    return (
        f'<figure class="panel"><figcaption>{escape(panel.title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{panel.title}. {described}")}">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def _points(
    rows: Sequence[Row], kind: str, key: str, *, x: str = "step", only: Callable[[Row], bool] | None = None
) -> list[Point]:
    points = []
    for row in rows:
        if row["kind"] == kind and (only is None or only(row)):
            at, value = row.get(x), row.get(key)
            if isinstance(at, int | float) and isinstance(value, int | float) and math.isfinite(value):
                points.append((float(at), float(value)))
    return points


def _drawable(curve: Curve) -> Curve:
    return Curve(curve.label, [(x, y) for x, y in curve.points if y > 0], curve.style, curve.marked)


def _axes(
    panel: Panel,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> list[str]:
    bottom, middle = HEIGHT - _BOTTOM, (HEIGHT - _TOP - _BOTTOM) / 2 + _TOP
    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{to_y(y):.1f}" y2="{to_y(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{to_y(y) + 3.5:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<line class="grid" x1="{to_x(x):.1f}" x2="{to_x(x):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{to_x(x):.1f}" y="{bottom + 14}" text-anchor="middle">{_number(x)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>')
    across = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{across}" y="{HEIGHT - 5}" text-anchor="middle">{escape(panel.x_label)}</text>')
    turned = f'transform="translate(12 {middle}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(panel.y_label)}</text>')
    return parts


def _line(curve: Curve, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> list[str]:
    drawn = [(to_x(x), to_y(y)) for x, y in curve.points]
    parts = [f'<polyline class="curve {curve.style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)}"/>']
    if curve.marked or len(drawn) == 1:
        for (x, y), (at, value) in zip(drawn, curve.points, strict=True):
            said = escape(f"{curve.label}: {_number(value)} at {_number(at)}")
            parts.append(
                f'<circle class="dot {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{said}</title></circle>'
            )
    return parts


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Returns about `_TICKS` round numbers between two ends."""
    raw = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    distance = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first = math.ceil(low / distance - 1e-9)
    return [n * distance for n in range(first, math.floor(high / distance + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.3g}"
