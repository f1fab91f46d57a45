"""Names, addresses and errors of jobs, without a cluster. With one: test_submitted_runs.py."""

import http.server
import socket
import threading

import pytest
from typer.testing import CliRunner

from gflowvlm.cli.main import app
from gflowvlm.cluster.launch import jobs as jobs_module
from gflowvlm.cluster.launch.job_client import DEFAULT_ADDRESS, job_address
from gflowvlm.cluster.launch.jobs import Jobs, check_name
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster_in_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "")


def test_the_address_comes_from_the_option_then_the_environment_then_this_machine(monkeypatch):
    assert job_address(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert job_address(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert job_address(None) == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example/cluster")
    assert job_address(None) == "https://ray.example/cluster"
    assert job_address("other:1234") == "http://other:1234"


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "file:///etc/passwd", "a b"])
def test_an_address_that_is_no_dashboard_is_refused(address):
    with pytest.raises(UserError, match="URL of the cluster's dashboard"):
        job_address(address)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-a", "a.", "a b", "a$(x)", "a" * 64, "ä"])
def test_a_name_that_could_be_more_than_a_name_is_refused(name):
    with pytest.raises(UserError, match="run name"):
        check_name(name)


def test_names_of_runs_fit():
    for name in ("a", "first-run", "numberline-tiny-20260101-000000", "v1.2_x", "a" * 63):
        check_name(name)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["submit", "--run", "runs/x"], ["--run 'runs/x'", "absolute"]),
        (["submit", "--name", "a/b"], ["run name 'a/b'"]),
        (["submit", "learner.stps=3"], ["did you mean 'learner.steps'"]),
        (["submit", "policy.model=./model"], ["policy.model = './model'", "absolute one of the cluster"]),
        (["submit", "--preset", "numberline-7b"], ["policy.model = './models/numberline-7b'", "of the cluster"]),
        (["submit", "rollout.demonstrations=sets/a"], ["rollout.demonstrations = 'sets/a'", "of the cluster"]),
        (["submit", "--preset", "alfworld-tiny", "task.games=games"], ["task.games = 'games'", "of the cluster"]),
        (["submit", "--resume", "x", "learner.steps=3"], ["--resume", "own settings"]),
        (["submit", "--resume", "runs/x"], ["--resume 'runs/x'", "absolute"]),
        (["submit", "--resume", "x", "--name", "y"], ["--resume", "--name"]),
        (["submit", "sampler.node_labels={a b: c}"], ["sampler.node_labels"]),
    ],
)
def test_what_cannot_be_sent_is_said_before_anything_is_sent(arguments, parts):
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, UserError)
    assert all(part in str(error) for part in parts), error


def test_a_cluster_that_does_not_answer_is_one_line():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=f"http://127.0.0.1:{port}: no Ray cluster answers"):
        Jobs(f"http://127.0.0.1:{port}")


def test_a_head_whose_agent_does_not_answer_is_one_line_that_says_what_to_do(monkeypatch):
    class Client:
        list_jobs = list

        def submit_job(self, **job):
            raise RuntimeError("Request failed with status code 500: No available agent to submit job.")

    monkeypatch.setattr(jobs_module, "connect", lambda address: Client())
    with pytest.raises(UserError, match=r"head's agent.*--dashboard-agent-listen-port"):
        Jobs().submit("first", RunConfig(), None, print)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "wants Ray's token"), (403, "refuses this token"), (404, "refuses"), (500, "no Ray cluster answers")],
)
def test_what_another_server_answers_is_one_line(status, message):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match=message):
            Jobs(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
