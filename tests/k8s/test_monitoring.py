"""Dashboard and alert rules: in step with the metrics in code, valid PromQL, and firing when they should."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from gflowvlm.cluster.monitoring.dashboards import DASHBOARD_FILE, dashboard_text, series
from gflowvlm.run.preset_library import load_preset
from gflowvlm.shared.metrics import ALL_METRICS
from tests.k8s.manifests import K8S, tool

ALERTS = K8S / "components" / "monitoring" / "alerts.yaml"
DOCS = K8S.parent / "docs" / "cluster.md"
OURS = {series(spec.name) for spec in ALL_METRICS}
# Ray's own that are not a node's; tests/k8s/test_exporter.py sees them at a real one.
OF_RAY = {"ray_actors", "ray_object_store_memory"}
OF_SERVE = {
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_starts_total",
    "ray_serve_replica_processing_queries",
}
OF_AUTOSCALER = {f"autoscaler_{name}" for name in ("active_nodes", "pending_nodes", "recently_failed_nodes")}
OF_NODES = {f"ray_{name}" for name in METRICS_GAUGES}


def rules() -> list[dict[str, Any]]:
    """The alert rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["spec"]["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard and of the rules."""
    panels = json.loads(DASHBOARD_FILE.read_text())["panels"]
    of_panels = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return of_panels + [rule["expr"] for rule in rules()]


def names_in(expression: str) -> set[str]:
    """Names of the series that an expression reads."""
    names: set[str] = set()

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name is not None:
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expression), note)
    return names


def test_the_dashboard_file_is_what_the_metrics_in_code_give() -> None:
    assert DASHBOARD_FILE.read_text() == dashboard_text(), "run: python -m cluster.dashboards"


def test_every_metric_has_a_panel() -> None:
    panels = json.loads(DASHBOARD_FILE.read_text())["panels"]
    shown = {name for p in panels for target in p.get("targets", []) for name in names_in(target["expr"])}
    assert shown >= OURS


def test_every_expression_is_promql_over_series_that_exist() -> None:
    known = OURS | OF_RAY | OF_SERVE | OF_AUTOSCALER | OF_NODES
    read = [(expression, names_in(expression)) for expression in expressions()]
    assert [expression for expression, names in read if not names or not names <= known] == []


def test_panels_have_one_place_each() -> None:
    panels = json.loads(DASHBOARD_FILE.read_text())["panels"]
    cells = [
        (x, y)
        for place in (p["gridPos"] for p in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert len({p["id"] for p in panels}) == len(panels)


def test_the_mismatch_alert_has_the_tolerance_of_the_preset() -> None:
    (rule,) = [r for r in rules() if r["alert"] == "GflowvlmMismatch"]
    assert rule["expr"].endswith(f"> {load_preset('numberline-7b').mismatch_limits.high:g}")


def test_every_alert_is_explained_in_the_guide() -> None:
    text = DOCS.read_text()
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in text] == []


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    """The rules as Prometheus reads them, without the Kubernetes object around."""
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(ALERTS.read_text())["spec"]))
    return file


def test_promtool_accepts_the_rules(rule_file: Path) -> None:
    done = subprocess.run([tool("promtool"), "check", "rules", str(rule_file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# One value a minute, in promtool's notation: `a+bxN` is a, a+b, ... N times, `_` is no sample.
HEALTHY = {
    "version": "1+1x120",
    "env_steps": "0+50x120",
    "wait_s": "1+0x120",
    "step_s": "10+0x120",
    "mismatch_mean": "0.01+0x120",
    "rollout_invalid": "0.02+0x120",
    "malformed_rate": "0+0x120",
    "skipped_updates": "0+0x120",
    "worker_restarts": "2+0x120",
    "groups_failed": "3+0x120",
}
TROUBLES = {
    "GflowvlmNoNewVersion": {"version": "1+1x20 21+0x100"},
    "GflowvlmNoRollouts": {"env_steps": "0+50x60 3000+0x60"},
    "GflowvlmBufferEmpty": {"wait_s": "1+0x60 9+0x60"},
    "GflowvlmMismatch": {"mismatch_mean": "0.01+0x60 0.5+0x60"},
    "GflowvlmInvalidResponses": {"rollout_invalid": "0.02+0x60 0.6+0x60"},
    "GflowvlmMalformedEvaluation": {"malformed_rate": "0+0x60 0.3+0x60"},
    "GflowvlmUpdatesSkipped": {"skipped_updates": "0+0x100 4+0x20"},
    "GflowvlmWorkersRestarting": {"worker_restarts": "2+0x100 2+1x20"},
    "GflowvlmGroupsFailing": {"groups_failed": "3+0x100 3+3x20"},
    "GflowvlmGpuMemoryFull": {"ray_node_gram_used": "80+0x120", "ray_node_gram_available": "1+0x120"},
    "GflowvlmSamplersDying": {
        f'ray_serve_deployment_replica_starts_total{{application="a", replica="{n}"}}': values
        for n, values in enumerate(("_x101 1+0x2 stale", "_x104 1+0x2 stale", "_x107 1+0x2 stale", "_x109 1+0x12"))
    },
    "GflowvlmNodesFailing": {"autoscaler_recently_failed_nodes": "0+0x60 5+0x60"},
}
AT = "115m"


def firing(rule_file: Path, changed: dict[str, str | None]) -> set[str]:
    """The alerts of a run that fire at minute 115, by promtool's evaluation of the rules.

    Args:
        rule_file: The rules.
        changed: Metrics of a healthy run with other values (None leaves one out), and series of Ray.
    """
    values = {name: value for name, value in {**HEALTHY, **changed}.items() if value is not None}
    written = [
        {"series": f'{series(name)}{{run="r", split="id"}}' if name in HEALTHY else name, "values": value}
        for name, value in values.items()
    ]
    names = [rule["alert"] for rule in rules()]
    expect_none = [{"eval_time": AT, "alertname": name, "exp_alerts": []} for name in names]
    test = {"interval": "1m", "input_series": written, "alert_rule_test": expect_none}
    file = rule_file.with_name("test.yaml")
    file.write_text(yaml.safe_dump({"rule_files": [str(rule_file)], "tests": [test]}))
    done = subprocess.run([tool("promtool"), "test", "rules", str(file)], capture_output=True, text=True)
    assert "SUCCESS" in done.stdout or "FAILED" in done.stdout + done.stderr, done.stderr
    found = set(re.findall(r"alertname:\s*(\w+)", done.stdout + done.stderr))
    assert (done.returncode == 0) == (found == set())
    return found


def test_no_alert_fires_for_a_healthy_run(rule_file: Path) -> None:
    assert firing(rule_file, {}) == set()


@pytest.mark.parametrize("alert", TROUBLES)
def test_each_trouble_fires_its_alert_and_no_other(rule_file: Path, alert: str) -> None:
    assert firing(rule_file, TROUBLES[alert]) == {alert}


def test_a_run_that_plays_and_never_gets_to_a_version_is_noticed(rule_file: Path) -> None:
    assert firing(rule_file, {"version": None}) == {"GflowvlmNoNewVersion"}


def test_a_resumed_run_goes_on_without_alarm(rule_file: Path) -> None:
    gap = {name: f"{value.split('x')[0]}x50 _x10 {value.split('x')[0]}x60" for name, value in HEALTHY.items()}
    assert firing(rule_file, gap) == set()
