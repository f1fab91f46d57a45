"""The names in the dashboard and the alerts, at the exporter of a real Ray cluster."""

import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from ray import serve

from gflowvlm.cluster.monitoring.dashboards import series
from gflowvlm.cluster.monitoring.telemetry import Telemetry
from gflowvlm.shared.metrics import ALL_METRICS

TIMEOUT_S = 120.0
FORGOTTEN_S = 25.0
"""Ray's exporter leaves a value out about twenty seconds after it was set."""

WANTED = {series(spec.name) for spec in ALL_METRICS} | {
    "ray_actors",
    "ray_object_store_memory",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_cpu_utilization",
    "ray_node_disk_utilization_percentage",
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_starts_total",
    "ray_serve_replica_processing_queries",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> str:
    """What Prometheus would be given, without a token: the exporter asks for none."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@serve.deployment
class Echo:
    def __call__(self, text: str) -> str:
        return text


@pytest.mark.slow
def test_ray_exports_every_series_that_the_dashboard_reads_under_its_name_with_its_labels(tmp_path: Path) -> None:
    port = free_port()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _metrics_export_port=port,
    )
    telemetry = Telemetry(tmp_path, "a-run")
    try:
        telemetry.send("train", {spec.name: 1.5 for spec in ALL_METRICS} | {"split": "id"}, step=1)
        sent = time.monotonic()
        serve.start(proxy_location="Disabled")
        handle = serve.run(Echo.bind(), route_prefix=None)
        missing, deadline = WANTED, sent + TIMEOUT_S
        while (missing or time.monotonic() < sent + FORGOTTEN_S) and time.monotonic() < deadline:
            telemetry.repeat()
            assert handle.remote("x").result(timeout_s=30) == "x"
            time.sleep(1.0)
            text = scrape(port)
            missing = {name for name in WANTED if re.search(rf"(?m)^{name}\{{", text) is None}
        assert missing == set()
        (ours,) = re.findall(rf"(?m)^{series('success')}\{{(.*)\}} (\S+)$", text)
        assert 'run="a-run"' in ours[0]
        assert 'split="id"' in ours[0]
        assert float(ours[1]) == 1.5
    finally:
        telemetry.close()
        serve.shutdown()
        ray.shutdown()
