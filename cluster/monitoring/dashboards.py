"""The Grafana dashboard of a run, made from the metric names in `gflowvlm.shared.metrics`.

`python -m gflowvlm.cluster.monitoring.dashboards` writes it anew; a test holds the file and the code together. What no
panel names gets a panel of its own at the end, so that a metric cannot be forgotten.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gflowvlm.shared.metrics import ALL_METRICS, EVALUATION_METRICS, PROMETHEUS_PREFIX

DASHBOARD_FILE = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring" / "dashboard.json"

RAY_PREFIX = "ray_"
"""What Ray's exporter puts before the names of an application's metrics."""

_UNITS = {"share": "percentunit", "seconds": "s", "GiB": "gbytes", "rate": "sci"}
_REPLICAS = "ray_serve_deployment_replica_starts_total"
_SPECS = {spec.name: spec for spec in ALL_METRICS}
_OF_EVALUATION = {spec.name for spec in EVALUATION_METRICS}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


def series(name: str) -> str:
    """Returns the Prometheus name of one of our metrics.

    Raises:
        KeyError: There is no metric of that name.
    """
    return RAY_PREFIX + PROMETHEUS_PREFIX + _SPECS[name].name


@dataclass(frozen=True)
class Query:
    """One line of a panel.

    Attributes:
        expression: PromQL.
        legend: Name of the line, with labels in ``{{ }}``.
    """

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One graph.

    Attributes:
        title: What it shows.
        queries: Its lines.
        unit: Grafana's unit.
        description: What to make of it.
    """

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    description: str = ""


def latest(name: str, legend: str = "") -> Query:
    """Returns a metric's value of each chosen run; after a restart of the driver the two series are one line."""
    labels = "run, split" if name in _OF_EVALUATION else "run"
    shown = "{{run}} {{split}}" if name in _OF_EVALUATION else "{{run}}"
    return Query(f'max by ({labels}) ({series(name)}{{run=~"$run"}})', f"{shown} {legend}".strip())


def growth(name: str, legend: str = "") -> Query:
    """Returns how fast a total grows, per second over five minutes."""
    return Query(f'max by (run) (deriv({series(name)}{{run=~"$run"}}[5m]))', f"{{{{run}}}} {legend}".strip())


def share(part: str, whole: str, legend: str) -> Query:
    """Returns one metric divided by another of the same run."""
    chosen = '{run=~"$run"}'
    return Query(
        f"max by (run) ({series(part)}{chosen}) / max by (run) ({series(whole)}{chosen})", f"{{{{run}}}} {legend}"
    )


def panel(title: str, *names: str, unit: str | None = None, description: str | None = None) -> Panel:
    """Returns a panel of our metrics' values, described by what the metrics say of themselves."""
    specs = [_SPECS[name] for name in names]
    legends = [""] if len(names) == 1 else list(names)
    return Panel(
        title,
        tuple(latest(name, legend) for name, legend in zip(names, legends, strict=True)),
        unit=_UNITS.get(specs[0].unit, "short") if unit is None else unit,
        description=" ".join(spec.description for spec in specs) if description is None else description,
    )


# Grafana's dashboards of Ray itself (nodes, actors, Serve) come with Ray; here is what a run's owner looks at first.
ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Is it learning",
        (
            panel("Success of rollouts", "rollout_success", "batch_success"),
            panel("Success in evaluation", "success", "success_greedy", "success_bound"),
            panel("Diversity (Div@N)", "div_at_n"),
            panel("Distance to the target", "total_variation", "total_variation_floor"),
            panel("Loss", "loss"),
            panel("Learner step", "step", "version"),
        ),
    ),
    (
        "Throughput",
        (
            panel("Response tokens per second", "tokens_per_s"),
            Panel("Environment steps per second", (growth("env_steps"),)),
            Panel("Learner steps per minute", (Query(f"60 * {growth('step').expression}", "{{run}}"),)),
            panel(
                "Learner step time",
                "step_s",
                "wait_s",
                "seconds_reference",
                "seconds_scoring",
                "seconds_loss",
                "seconds_backward",
                "publish_s",
                "sampler_sleep_s",
            ),
            Panel(
                "Waiting shares",
                (share("wait_s", "step_s", "learner waits for a batch"), latest("sampler_idle_share", "sampler idle")),
                unit="percentunit",
                description="Both near 0: well matched. Learner waits: more samplers or rollout workers. "
                "Sampler idle: more groups in flight, or a slower learner is the limit.",
            ),
            panel("Response length", "mean_response_tokens", "rollout_length"),
        ),
    ),
    (
        "Queues and age of the data",
        (
            panel("Replay buffer", "buffer_size", "accepted"),
            panel("Groups being played", "groups_running"),
            panel(
                "Rollout workers and replicas",
                "rollout_workers",
                "rollout_workers_wanted",
                "sampler_replicas",
                "sampler_replicas_wanted",
                description="In service, beside what the run is set to (`gflowvlm scale`, scaling.automatic).",
            ),
            panel("Requests at this run's replicas", "sampler_requests"),
            Panel(
                "Requests at the policy server",
                (
                    Query("sum by (deployment) (ray_serve_deployment_queued_queries)", "{{deployment}} waiting"),
                    Query("sum by (deployment) (ray_serve_replica_processing_queries)", "{{deployment}} running"),
                ),
                description="Ray Serve's own figures, all runs of the cluster together.",
            ),
            panel("Staleness", "staleness_mean", "staleness_max"),
            Panel(
                "Policy server replicas",
                (
                    Query(f"count by (application) ({_REPLICAS})", "{{application}} there"),
                    Query(
                        f"count by (application) (last_over_time({_REPLICAS}[15m])) - "
                        f"count by (application) ({_REPLICAS})",
                        "{{application}} gone in 15 minutes",
                    ),
                ),
                description="Replicas that go again and again: the engine dies, and the run stands still.",
            ),
        ),
    ),
    (
        "Health",
        (
            panel("Sampler against learner", "mismatch_mean"),
            panel(
                "Invalid and cut-off responses",
                "rollout_invalid",
                "rollout_cut",
                "malformed_rate",
                "inadmissible_rate",
                "cut_rate",
            ),
            panel("Failures and restarts", "groups_failed", "groups_set_aside", "worker_restarts", "skipped_updates"),
            panel("Gradient norm", "grad_norm", "head_grad_norm"),
            panel("Residuals", "residual_abs_mean", "residual_abs_max"),
            panel(
                "Trajectories that teach nothing",
                "trajectories_dropped",
                "trajectories_without_flow",
                "groups_of_one",
                "steps_without_signal",
            ),
            Panel(
                "Actors by state",
                (Query('sum by (State) (ray_actors{State=~"ALIVE|RESTARTING|PENDING_CREATION|DEAD"})', "{{State}}"),),
                description="Ray's own figures, all runs of the cluster together.",
            ),
            Panel(
                "Nodes",
                (
                    Query("sum by (NodeType) (autoscaler_active_nodes)", "{{NodeType}} active"),
                    Query("sum by (NodeType) (autoscaler_pending_nodes)", "{{NodeType}} pending"),
                    Query("sum by (NodeType) (autoscaler_recently_failed_nodes)", "{{NodeType}} failed"),
                ),
                description="Ray's autoscaler.",
            ),
        ),
    ),
    (
        "Machines",
        (
            Panel(
                "GPU memory",
                (
                    Query(
                        "ray_node_gram_used / (ray_node_gram_used + ray_node_gram_available)",
                        "{{instance}} GPU {{GpuIndex}}",
                    ),
                ),
                unit="percentunit",
                description="Used share of each GPU's memory. A sampler takes sampler.gpu_memory_utilization at start.",
            ),
            Panel(
                "GPU use",
                (Query("ray_node_gpus_utilization / 100", "{{instance}} GPU {{GpuIndex}}"),),
                unit="percentunit",
            ),
            Panel("Memory", (Query("ray_node_mem_used / ray_node_mem_total", "{{instance}}"),), unit="percentunit"),
            Panel("CPU use", (Query("ray_node_cpu_utilization / 100", "{{instance}}"),), unit="percentunit"),
            Panel(
                "Object store",
                (Query("sum by (Location) (ray_object_store_memory)", "{{Location}}"),),
                unit="bytes",
                description="SPILLED growing means that it is full.",
            ),
            Panel("Disk", (Query("ray_node_disk_utilization_percentage / 100", "{{instance}}"),), unit="percentunit"),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """Returns the dashboard in Grafana's JSON model."""
    return {
        "uid": "gflowvlm",
        "title": "GFlowVLM",
        "tags": ["gflowvlm", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": _datasource(),
                    "query": f"label_values({series('env_steps')}, run)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "sort": 2,
                },
            ]
        },
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    top, number = 0, 0
    named = " ".join(query.expression for _, panels in ROWS for each in panels for query in each.queries)
    others = tuple(panel(name, name) for name in _SPECS if f"{series(name)}{{" not in named)
    for title, panels in (*ROWS, ("Everything else", others)):
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": _WIDTH * _COLUMNS, "h": 1},
        }
        top += 1
        for index, each in enumerate(panels):
            number += 1
            row, column = divmod(index, _COLUMNS)
            place = {"x": column * _WIDTH, "y": top + row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield {"id": number, "gridPos": place, **_graph(each)}
        top += -(-len(panels) // _COLUMNS) * _HEIGHT


def _graph(shown: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": shown.title,
        "description": shown.description,
        "datasource": _datasource(),
        "fieldConfig": {"defaults": {"unit": shown.unit, "custom": {"spanNulls": True}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _datasource(),
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(shown.queries)
        ],
    }


def _datasource() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def dashboard_text() -> str:
    """Returns the dashboard as it stands in its file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD_FILE.write_text(dashboard_text(), encoding="utf-8")
