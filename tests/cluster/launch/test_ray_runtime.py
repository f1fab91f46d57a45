"""What is settled before Ray is started or connected to. With a cluster: test_submitted_runs.py."""

import json
import os
from pathlib import Path

import pytest

import gflowvlm
from gflowvlm.cluster.launch import process_environment
from gflowvlm.cluster.launch.local_capacity import LocalCapacity
from gflowvlm.cluster.launch.process_environment import PROCESS_ENVIRONMENT
from gflowvlm.cluster.launch.ray_runtime import (
    check_local_ray,
    connection_environment,
    dashboard_line,
    ray_cluster,
    worker_environment,
)
from gflowvlm.run.preset_library import load_preset
from gflowvlm.shared.errors import UserError


@pytest.mark.parametrize(
    ("setting", "asked"),
    [("rollout.node_labels={disk: ssd}", "disk=ssd"), ("sampler.resources_per_replica={h100: 1}", "1 h100")],
)
def test_a_local_run_cannot_ask_for_labels_or_custom_resources(setting, asked):
    with (
        pytest.raises(UserError, match=f"asks for {asked}, which a local cluster does not have"),
        ray_cluster(load_preset("numberline-tiny", [setting])),
    ):
        pass


def test_a_python_that_is_started_finds_this_package_first_and_then_what_it_was_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"mine{os.pathsep}{os.pathsep}/theirs")
    root = str(Path(gflowvlm.__file__).parents[1])
    assert worker_environment()["PYTHONPATH"].split(os.pathsep) == [root, str(tmp_path / "mine"), "/theirs"]
    assert worker_environment()["PYTHONSAFEPATH"] == "1"
    monkeypatch.setattr(process_environment.site, "getsitepackages", lambda: [root])
    assert worker_environment()["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "mine"), "/theirs"]


def test_more_workers_than_a_machine_has_memory_for_are_refused_before_ray_starts(monkeypatch):
    monkeypatch.setattr(LocalCapacity, "now", lambda: LocalCapacity(cores=2, free_gib=4.0))
    assert check_local_ray(load_preset("numberline-tiny", ["rollout.workers=8"])) is None
    with pytest.raises(UserError, match=r"rollout\.workers=100: this machine has room for 8 "):
        check_local_ray(load_preset("numberline-tiny", ["rollout.workers=100"]))


def test_a_user_is_told_how_to_get_into_the_dashboard(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert dashboard_line("127.0.0.1:8265").endswith(
        "http://127.0.0.1:8265 (the token it asks for: ray get-auth-token)"
    )
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert dashboard_line("127.0.0.1:8265").endswith("http://127.0.0.1:8265")


def test_processes_on_a_cluster_get_the_environment_that_they_need(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    for name in PROCESS_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert connection_environment() == dict(PROCESS_ENVIRONMENT)
    monkeypatch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "0")
    assert connection_environment()["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "0"


def test_variables_that_a_job_was_sent_with_are_left_to_it(monkeypatch):
    sent = {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"RAY_TRAIN_V2_ENABLED": "1", "OTHER": "2"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(sent))
    assert set(connection_environment()) == set(PROCESS_ENVIRONMENT) - {"RAY_TRAIN_V2_ENABLED"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": None}, "metadata": {}}))
    assert set(connection_environment()) == set(PROCESS_ENVIRONMENT)
