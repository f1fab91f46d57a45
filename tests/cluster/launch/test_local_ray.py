"""A local Ray that cannot start is one line that says what is wrong, where, and what to do."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from ray import exceptions

from gflowvlm.cluster.launch import ray_runtime
from gflowvlm.cluster.launch.doctor import Status, check_folder_of_ray
from gflowvlm.cluster.launch.local_ray import start_local_ray
from gflowvlm.cluster.launch.ray_folder import check_ray_folder, ray_folder
from gflowvlm.cluster.launch.ray_runtime import ray_cluster
from gflowvlm.run.preset_library import load_preset
from gflowvlm.shared.errors import UserError

ROOT = Path(__file__).parents[3]
SOCKET_PATH = 107


@pytest.fixture
def short_folder(tmp_path_factory):
    """A folder with a path as short as they get here."""
    folder = Path("/tmp", f"gfv{os.getpid()}")
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def nested(folder, length):
    """Makes a folder inside whose path has so many bytes."""
    made = folder / ("x" * (length - len(str(folder)) - 1))
    made.mkdir()
    return made


def test_a_folder_that_is_fit_is_accepted_and_left_as_it_was(short_folder, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    check_ray_folder()
    assert ray_folder() == short_folder / "ray"
    assert list(ray_folder().iterdir()) == []
    assert check_folder_of_ray().status is Status.OK


def test_the_folder_is_the_one_that_ray_takes(monkeypatch):
    from ray._common.utils import get_default_ray_temp_dir

    for variables in ({}, {"TMPDIR": "/var/tmp"}, {"TMPDIR": "/var/tmp", "RAY_TMPDIR": "/opt/x"}):
        for name in ("TMPDIR", "RAY_TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(ray_folder()) == get_default_ray_temp_dir()


@pytest.mark.parametrize(
    ("length", "too_long"),
    # With 36 bytes Ray has started with its dashboard; with 38 the dashboard died after a minute.
    [(35, 0), (39, 4), (80, 45)],
)
def test_a_path_too_long_for_rays_sockets_is_refused_before_anything_starts(
    short_folder, monkeypatch, length, too_long
):
    monkeypatch.setenv("RAY_TMPDIR", str(nested(short_folder, length)))
    if too_long == 0:
        check_ray_folder()
        return
    with pytest.raises(UserError, match=f"is {too_long} bytes too long for its sockets; set RAY_TMPDIR"):
        start_local_ray({})
    found = check_folder_of_ray()
    assert found.status is Status.BROKEN
    assert "bytes too long" in found.detail
    assert "set RAY_TMPDIR" in found.advice


@pytest.mark.parametrize("folder", ["/proc/nope", "relative"])
def test_a_folder_that_cannot_be_used_is_named(folder, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(UserError, match=rf"Ray cannot start: .*{folder}/ray.*; set RAY_TMPDIR"):
        check_ray_folder()
    assert check_folder_of_ray().status is Status.BROKEN


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("the amount of memory is less than -1600% of total."), "the amount of memory is less"),
        (Exception("The current node timed out during startup.\nIt may be overloaded."), "It may be overloaded."),
        (
            Exception("The last 20 lines of x/dashboard.log:\n  File y\nRuntimeError: MetricsHead failed to start."),
            "RuntimeError: MetricsHead failed to start.; cluster.dashboard=false runs without it",
        ),
        (OSError("[Errno 28] No space left on device"), "No space left on device"),
    ],
)
def test_whatever_ray_raises_at_its_start_is_one_line(error, said, monkeypatch):
    def init(**options):
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        start_local_ray({}, num_cpus=1)
    assert str(caught.value).startswith("Ray cannot start on this machine: ")
    assert "\n" not in str(caught.value)
    assert "gflowvlm doctor --ray" in str(caught.value)


def test_a_ray_that_fails_later_is_one_line_and_errors_of_our_code_are_not_touched(monkeypatch):
    class Context:
        dashboard_url = ""

    monkeypatch.setattr(ray_runtime, "start_local_ray", lambda *environment, **options: Context())
    monkeypatch.setattr(ray, "cluster_resources", dict)
    config = load_preset("numberline-tiny")
    said = r"Ray has failed \(RaySystemError: .*gone\); its logs are in"
    with pytest.raises(UserError, match=said), ray_cluster(config):
        raise exceptions.RaySystemError("gone")
    with pytest.raises(exceptions.RayTaskError), ray_cluster(config):
        raise exceptions.RayTaskError("f", "Traceback ...", ValueError("ours"))


@pytest.mark.parametrize("command", [["train", "--run", "r"], ["bench", "--quick", "--parts", "replay"]])
def test_commands_that_start_ray_say_why_they_cannot(command, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/proc/nope", "COLUMNS": "80"}
    command = [sys.executable, "-m", "gflowvlm", *command]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("gflowvlm: Ray cannot start")]
    assert "/proc/nope/ray" in line
    assert "RAY_TMPDIR" in line
    assert list(tmp_path.iterdir()) == []


def test_ray_is_as_quiet_as_before_once_it_has_started(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **options: logging.getLogger("ray").setLevel(options["logging_level"]))
    start_local_ray({})
    assert logging.getLogger("ray").level == logging.ERROR


_STATE_OF_OWN_ACTOR = """
import sys, ray
from ray.util.state import get_actor
from ray.util.state.exception import ServerUnavailable
from gflowvlm.cluster.launch.local_ray import start_local_ray
from gflowvlm.cluster.launch.ray_runtime import worker_environment

class Guard:
    def knows(self, actor):
        try:
            return str(get_actor(actor, timeout=30).state)
        except ServerUnavailable:
            return "unknown"

start_local_ray(
    worker_environment(), num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=sys.argv[1] == "with"
)
guard = ray.remote(num_cpus=0)(Guard).remote()
print(ray.get(guard.knows.remote(guard._actor_id.hex()), timeout=60))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dashboard", "state"), [("with", "ALIVE"), ("without", "unknown")])
def test_workers_ask_no_other_cluster_for_the_state_of_their_own(dashboard, state):
    # Ray Train removes the placement group of a learner whose controller is not known there.
    with _dashboard_of_another_cluster() as other:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_API_SERVER_ADDRESS": other}
        command = [sys.executable, "-c", _STATE_OF_OWN_ACTOR, dashboard]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.stdout.splitlines()[-1:] == [state], result.stderr


@contextmanager
def _dashboard_of_another_cluster():
    """A server that knows no actor, where Ray's dashboards are unless told otherwise, or beside one that is there."""

    class Nobody(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"result": True, "msg": "", "data": {"result": {"total": 0, "result": []}}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

    try:
        server = ThreadingHTTPServer(("127.0.0.1", 8265), Nobody)
    except OSError:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Nobody)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
