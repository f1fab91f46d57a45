"""Runs sent to a Ray cluster of several nodes, with token authentication, each node a process tree of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from gflowvlm.run.checkpoints import latest_checkpoint
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import read_rows
from gflowvlm.shared.config_io import load_config
from tests.cli.test_errors import assert_one_line
from tests.whole_runs import (
    MARK,
    ROOT,
    acknowledged,
    assert_steps_and_versions_go_on,
    newest_step,
    processes_of,
    wait_for,
)

START_S, RUN_S = 90.0, 240.0
# Enough for some to be left when it is stopped after the first.
STEPS = 32
SETTINGS = (
    f"learner.steps={STEPS}",
    "sampler.engine=transformers",
    "evaluation.at_start=false",
    "evaluation.every=1000",
    "evaluation.instances=2",
    "evaluation.samples=2",
    "rollout.group_size=2",
    # Where things go: rollout workers on the second node, all else on the head's.
    "rollout.node_labels={place: second}",
    "rollout.resources_per_worker={seats: 1}",
    "sampler.node_labels={place: '!second'}",
    "learner.resources_per_worker={learners: 1}",
    "cluster.control_resources={drivers: 0.3}",
)


@dataclass
class Cluster:
    """A running cluster and how to reach it."""

    gcs: str
    dashboard: str
    environment: dict[str, str]
    head: subprocess.Popen
    second: subprocess.Popen
    runs: Path
    join: Callable[[str], subprocess.Popen]

    def command(self, *arguments, **environment):
        """What `subprocess` needs for one of our commands against the cluster."""
        return {
            "args": [sys.executable, "-m", "gflowvlm.cli.main", *arguments],
            "cwd": self.runs.parent,
            "env": {**self.environment, "PYTHONPATH": str(ROOT), "COLUMNS": "400", **environment},
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }

    def gflowvlm(self, *arguments, **environment):
        try:
            return subprocess.run(timeout=RUN_S, **self.command(*arguments, **environment))
        except subprocess.TimeoutExpired as late:
            pytest.fail(f"gflowvlm {arguments}: no end in {RUN_S} s:\n{(late.stdout or b'').decode()[-4000:]}")

    def processes(self, title, node):
        """Processes of one node whose title begins so."""
        found = []
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def free_ports(count):
    held = [socket.socket() for _ in range(count)]
    try:
        for probe in held:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in held]
    finally:
        for probe in held:
            probe.close()


def start_node(folder, name, environment, *arguments):
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", *arguments],
        env=environment,
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(folder, nodes):
    """Ends the nodes and whatever they have left."""
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(processes_of(folder), timeout=10)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for node in nodes:
        node.wait(timeout=10)


def end_session(node):
    """Ends what a node that is no more has left, so that another can take its place."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == node.pid:
                process.kill()


@pytest.fixture(scope="module")
def cluster():
    # A short path: sockets below it may not be longer than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="gfray", dir="/tmp"))
    gcs, dashboard, client, agent = free_ports(4)
    # As an image with an older version of this project has it: whoever imports that one fails.
    (folder / "image" / "gflowvlm").mkdir(parents=True)
    (folder / "image" / "gflowvlm" / "__init__.py").write_text('raise RuntimeError("not what was sent")\n')
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PYTHONPATH": str(folder / "image"),
        "PYTHONSAFEPATH": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "GFLOWVLM_RUNS": str(folder / "runs"),
        MARK: str(folder),
    }
    size = ("--num-cpus=4", f"--object-store-memory={100 * 2**20}")
    ports = (f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}")
    head = start_node(
        folder,
        "head",
        environment,
        "--head",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        *ports,
        f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={folder / 'ray'}",
        '--resources={"learners": 1, "drivers": 1}',
        *size,
    )
    nodes = [head]

    def join(name, attempts=2):
        """Starts a node for two rollout workers; returns once it has joined.

        Ray gives up a node that the head has not answered within 30 s, as happens on a busy machine. Whatever looks
        after a cluster's nodes then starts another in its place, and so does this.
        """
        node = start_node(
            folder,
            name,
            environment,
            f"--address=127.0.0.1:{gcs}",
            "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={free_ports(1)[0]}",
            # Each node unpacks the job's code for itself, over what is there.
            f"--temp-dir={folder / name}",
            "--labels=place=second",
            '--resources={"seats": 2}',
            *size,
        )
        nodes.append(node)
        joined = folder / f"{name}.log"
        try:
            wait_for(lambda: "Ray runtime started" in joined.read_text(), f"the node {name}", node, joined, START_S)
        except AssertionError:
            if attempts == 1 or node.poll() is None:
                raise
            end_session(node)
            return join(name, attempts - 1)
        return node

    try:
        wait_for(lambda: answers(dashboard), "the dashboard", head, folder / "head.log", START_S)
        second, url = join("second"), f"http://127.0.0.1:{dashboard}"
        yield Cluster(f"127.0.0.1:{gcs}", url, environment, head, second, folder / "runs", join)
    finally:
        end(folder, nodes)
        shutil.rmtree(folder, ignore_errors=True)


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_run_is_sent_once_placed_stopped_and_resumed_to_its_end(cluster):
    folder = RunFolder(cluster.runs / "first")
    log = cluster.runs.parent / "first.log"
    command = cluster.command("submit", "--name", "first", *SETTINGS)
    sent = subprocess.Popen(**{**command, "stdout": log.open("w"), "stderr": subprocess.STDOUT})
    wait_for(lambda: "run folder:" in log.read_text(), "the driver", sent, log, RUN_S)
    again = cluster.gflowvlm("submit", "--name", "first", *SETTINGS)
    assert_one_line(again, "run 'first' is RUNNING already", "gflowvlm stop first")
    wait_for(lambda: newest_step(folder) >= 1, "a step", sent, log, RUN_S)
    sent.send_signal(signal.SIGINT)
    assert sent.wait(timeout=60) == 130
    assert "no longer following; first goes on" in log.read_text()

    (worker,) = cluster.processes("ray::RolloutWorker", cluster.second)
    (replica,) = cluster.processes("ray::ServeReplica", cluster.head)
    for process in (worker, replica):
        environment = process.environ()
        assert (environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"], environment["RAY_TRAIN_V2_ENABLED"]) == ("1", "1")
        sent_code, *others = environment["PYTHONPATH"].split(os.pathsep)
        assert "working_dir_files" in sent_code
        assert str(cluster.runs.parent / "image") in others

    stopped = cluster.gflowvlm("stop", "first")
    assert "gflowvlm submit --resume first" in stopped.stdout, stopped.stderr
    followed = cluster.gflowvlm("logs", "first")
    assert followed.returncode == 130, followed.stderr
    assert "learner started at step 0" in followed.stdout
    assert "first was stopped; go on with: gflowvlm submit --resume first" in followed.stdout
    taken = newest_step(folder)
    assert 1 <= taken < STEPS, followed.stdout
    assert latest_checkpoint(folder.checkpoints).name == f"step-{taken:08d}"
    assert not cluster.processes("ray::RolloutWorker", cluster.second)

    resumed = cluster.gflowvlm("submit", "--resume", "first")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"learner started at step {taken}" in resumed.stdout
    assert_steps_and_versions_go_on(folder, last=STEPS)
    assert folder.summary.exists()
    listed = cluster.gflowvlm("jobs").stdout
    assert listed.index("SUCCEEDED") < listed.index("STOPPED")
    assert [r["step"] for r in read_rows(folder.metrics) if r["kind"] == "learner"] == [0, taken]


def snapshots(folder):
    return [row for row in read_rows(folder.metrics) if row["kind"] == "rollout"]


@pytest.mark.slow
def test_a_run_is_scaled_while_it_runs_uses_a_node_that_joins_and_survives_one_that_leaves(cluster):
    folder, log = RunFolder(cluster.runs / "scaled"), cluster.runs.parent / "second.log"
    waits = partial(wait_for, run=cluster.second, log=log, timeout_s=RUN_S)
    # More steps than are taken; it is stopped in the end.
    sent = cluster.gflowvlm("submit", "--detach", "--name", "scaled", *SETTINGS, "learner.steps=10000")
    assert sent.returncode == 0, sent.stderr
    waits(lambda: newest_step(folder) >= 1, "a step")
    answer = cluster.gflowvlm("scale", "scaled", "rollout.workers=4", "sampler.replicas=2")
    wanted = "rollout.workers 1 -> 4, sampler.replicas 1 -> 2; no room yet for 2 of 4 rollout workers"
    assert wanted in answer.stdout, answer.stdout + answer.stderr
    waits(lambda: snapshots(folder)[-1]["rollout_workers"] == 2, "the worker that has room")
    waits(lambda: snapshots(folder)[-1].get("sampler_replicas") == 2, "the replica")
    third, joined = cluster.join("third"), time.monotonic()
    waits(lambda: snapshots(folder)[-1]["rollout_workers"] == 4, "the workers on the third node")
    print(f"a node that joined was used after {time.monotonic() - joined:.1f} s")
    assert len(cluster.processes("ray::RolloutWorker", third)) == 2
    step = newest_step(folder)
    waits(lambda: newest_step(folder) > step, "steps with four workers")
    assert (
        "rollout.workers 4 -> 3, sampler.replicas 2 -> 1"
        in cluster.gflowvlm("scale", str(folder.root), "rollout.workers=3", "sampler.replicas=1").stdout
    )
    waits(lambda: snapshots(folder)[-1]["rollout_workers"] == 3, "a worker to leave")
    waits(lambda: snapshots(folder)[-1].get("sampler_replicas") == 1, "the replica to leave")
    assert {(row["groups_failed"], row["worker_restarts"]) for row in snapshots(folder)} == {(0, 0)}

    third.send_signal(signal.SIGTERM)
    third.wait(timeout=60)
    waits(lambda: snapshots(folder)[-1]["rollout_workers"] == 2, "the loss to be noticed")
    step = newest_step(folder)
    waits(lambda: newest_step(folder) > step, "steps without the third node")
    assert cluster.gflowvlm("stop", "scaled").returncode == 0
    played, config = acknowledged(folder), load_config(folder.config)
    assert set(played.values()) == {1}
    # The capacity rule: at most so far ahead of the learner, up to a group that the rounding lets start.
    ahead = len(played) - config.fresh_per_step * (newest_step(folder) + 1 + config.buffer.max_staleness)
    assert ahead <= config.rollout.group_size
    assert_steps_and_versions_go_on(folder, newest_step(folder))


@pytest.mark.slow
def test_a_cluster_without_room_is_said_by_dry_run_and_ends_a_run_in_time(cluster):
    address = f"cluster.address={cluster.gcs}"
    planned = cluster.gflowvlm("train", "--dry-run", address, "sampler.node_labels={place: nowhere}", *SETTINGS[:2])
    assert planned.returncode == 1, planned.stderr
    assert "place=second" in planned.stdout
    assert "lacking: the policy server replica (0.5 CPU and place=nowhere): none of 2 nodes" in planned.stdout
    assert "would wait 600 s" in planned.stdout
    limit = "cluster.wait_for_resources_s=2"
    run = cluster.gflowvlm("train", "--run", "small", address, limit, "learner.resources_per_worker={learners: 2}")
    assert_one_line(run, "no room on the cluster within 2 s", "the learner (0.5 CPU, 2 learners): 2 nodes, none with")
    assert "waiting for room on the cluster, at most 2 s" in run.stdout


@pytest.mark.slow
def test_a_missing_or_wrong_token_is_one_line(cluster):
    assert_one_line(cluster.gflowvlm("jobs", RAY_AUTH_MODE="disabled"), "wants Ray's token", "RAY_AUTH_TOKEN")
    assert_one_line(cluster.gflowvlm("jobs", RAY_AUTH_TOKEN="0" * 64), "refuses this token", "RAY_AUTH_TOKEN")
