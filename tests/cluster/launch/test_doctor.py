"""`gflowvlm doctor`: finds what is broken, also what crashes, and says what to do."""

import json
import socket
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gflowvlm.cli.commands import doctor
from gflowvlm.cluster.launch.doctor import (
    check_dashboard_port,
    check_model,
    check_ray_start,
    check_shared_memory,
    check_torchvision,
    check_vllm,
    probe,
)
from gflowvlm.learner.tiny_policy import TinyShape, build_tiny_policy
from gflowvlm.shared.cluster_settings import ClusterSettings
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.findings import Status


@pytest.fixture
def extra_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages the checks find before the installed ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def _package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def _command() -> typer.Typer:
    app = typer.Typer()
    doctor.register(app)
    return app


def test_a_crashing_probe_is_a_finding_and_not_a_crash() -> None:
    result = probe("import os; os.abort()")
    assert result.code == -6
    assert result.values == {}


def test_a_hanging_probe_ends_at_its_timeout() -> None:
    result = probe("import time; time.sleep(60)", timeout_s=0.5)
    assert result.code is None
    assert "0 s" in result.error or "1 s" in result.error


def test_a_failing_probe_gives_the_error_in_one_line() -> None:
    result = probe("raise RuntimeError('operator does not exist')")
    assert result.error == "RuntimeError: operator does not exist"


def test_torchvision_that_does_not_fit_torch_is_broken_and_its_removal_is_named(extra_packages: Path) -> None:
    _package(extra_packages, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    found = check_torchvision()
    assert found.status is Status.BROKEN
    assert "torchvision::nms" in found.detail
    assert "uninstall -y torchvision" in found.advice


def test_installed_or_absent_torchvision_of_this_environment_is_fine() -> None:
    assert check_torchvision().status is Status.OK


def test_vllm_that_crashes_the_process_is_broken_and_the_other_sampler_is_named(extra_packages: Path) -> None:
    _package(extra_packages, "vllm", "import os; os.abort()")
    found = check_vllm()
    assert found.status is Status.BROKEN
    assert "crashed" in found.detail
    assert "sampler.engine=transformers" in found.advice


def test_an_occupied_dashboard_port_is_noted() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert check_dashboard_port(port).status is Status.NOTE
    assert check_dashboard_port(port).status is Status.OK


def test_an_object_store_larger_than_shared_memory_is_noted() -> None:
    config = RunConfig(cluster=ClusterSettings(object_store_mib=1_048_576))
    assert check_shared_memory(config).status is Status.NOTE


def test_a_missing_model_is_broken_with_one_line(tmp_path: Path) -> None:
    found = check_model(str(tmp_path / "nothing"))
    assert found.status is Status.BROKEN
    assert "no such directory" in found.detail
    assert "\n" not in found.detail


@pytest.mark.slow
def test_a_model_with_one_done_token_loads(tmp_path: Path) -> None:
    build_tiny_policy(tmp_path / "model", seed=0, shape=TinyShape())
    found = check_model(str(tmp_path / "model"))
    assert found.status is Status.OK
    assert "[DONE] is token" in found.detail


@pytest.mark.slow
def test_the_default_run_works_here(tmp_path: Path) -> None:
    result = CliRunner().invoke(_command(), ["--json", str(tmp_path / "findings.json")])
    assert result.exit_code == 0, result.output
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert findings["works"] is True
    assert {"packages", "torch", "torchvision", "vllm", "ray", "model", "disk", "memory"} <= {
        check["name"] for check in findings["checks"]
    }
    assert all(check["advice"] != "" for check in findings["checks"] if check["status"] != "ok")
    assert findings["versions"]["torch"] is not None
    assert findings["machine"]["cores"] >= 1


@pytest.mark.slow
def test_the_command_exits_with_1_when_something_needed_is_broken(extra_packages: Path) -> None:
    _package(extra_packages, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    result = CliRunner().invoke(_command(), [])
    assert result.exit_code == 1
    assert "does not work here yet" in result.output


@pytest.mark.slow
def test_a_local_ray_starts_and_its_dashboard_answers_with_the_token() -> None:
    found = check_ray_start(RunConfig())
    assert found.status is Status.OK, found
    assert "http://127.0.0.1" in found.detail
