"""Whole runs through real Ray, Serve, vLLM and Ray Train: what happens when processes die.

One run is started in a process of its own; the test kills parts of it and reads its folder.
"""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import read_rows
from tests.small_disks import small_disk
from tests.whole_runs import (
    acknowledged,
    assert_nothing_is_left,
    assert_steps_and_versions_go_on,
    finish,
    newest_step,
    processes_of,
    start,
    wait_for,
)


def settings(steps):
    return [
        f"learner.steps={steps}",
        f"evaluation.every={steps}",
        "evaluation.instances=2",
        "evaluation.samples=2",
        "learner.groups_per_batch=2",
        "rollout.group_size=4",
        "evaluation.at_start=false",
    ]


TWO_WORKERS = ("rollout.workers=2", "rollout.groups_per_worker=1")

QUICK = ("rollout.workers=1", "rollout.groups_per_worker=2", "sampler.engine=transformers", "cluster.dashboard=false")
"""For runs that are started often: what they do without starts in a fraction of the time."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prometheus(port, name):
    """Values of one of our metrics at the Prometheus endpoint of the run's node; [] while it has none."""
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except OSError:
        return []
    return [float(value) for value in re.findall(rf"^ray_gflowvlm_{name}{{.*}} (\S+)$", text, flags=re.MULTILINE)]


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of its own that can be filled; None without the right to mount one."""
    with small_disk(tmp_path / "small", "64m") as folder:
        yield folder


def fill(path):
    with contextlib.suppress(OSError), path.open("wb") as file:
        while True:
            file.write(bytes(2**16))


def test_a_run_goes_on_when_any_of_its_processes_is_killed(tmp_path):
    # Enough for the run to be still going when the last of its processes is killed.
    steps = 40
    folder, log, port = RunFolder(tmp_path / "run"), tmp_path / "log", free_port()
    run = start("--run", folder.root, *settings(steps), *TWO_WORKERS, f"cluster.metrics_port={port}", log=log)
    try:
        wait_for(lambda: newest_step(folder) >= 2, "the second step", run, log)
        wait_for(lambda: max(prometheus(port, "step"), default=0) >= 2, "the step at the Prometheus endpoint", run, log)
        assert max(prometheus(port, "env_steps")) > 0
        wait_for(lambda: max(prometheus(port, "accepted"), default=0) > 0, "the buffer's count there", run, log)
        for number, title in enumerate(
            ("ray::RolloutWorker", "ray::ReplayBufferActor", "ray::RayTrainWorker", "ray::ServeReplica")
        ):
            before = acknowledged(folder)
            step = newest_step(folder)
            victims = processes_of(log, title)
            assert victims, f"no process {title}: {log.read_text()[-2000:]}"
            victims[0].kill()
            wait_for(lambda step=step: newest_step(folder) >= step + 2, f"two steps after killing {title}", run, log)
            after = acknowledged(folder)
            assert set(before) <= set(after), f"kill number {number} lost trajectories"
            assert set(after.values()) == {1}
        assert run.wait(timeout=400) == 0, log.read_text()[-4000:]
    finally:
        run.kill()
        run.wait(timeout=30)
    assert_steps_and_versions_go_on(folder, steps)
    assert json.loads(folder.summary.read_text())["steps"] == steps
    assert_nothing_is_left(log)


def scale(folder, *wanted):
    command = [sys.executable, "-m", "gflowvlm.cli.main", "scale", str(folder.root), *wanted]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_rollouts_go_from_two_to_eight_and_back_without_a_failed_group(tmp_path):
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"

    def snapshots():
        return [row for row in read_rows(folder.metrics) if row["kind"] == "rollout"]

    def in_service(workers):
        wait_for(lambda: snapshots()[-1]["rollout_workers"] == workers, f"{workers} workers", run, log)
        accepted = snapshots()[-1]["accepted"]
        wait_for(lambda: snapshots()[-1]["accepted"] >= accepted + 16, f"what {workers} workers play", run, log)

    # More steps than are taken; it is stopped in the end.
    run = start("--run", folder.root, *settings(10_000), *QUICK, "rollout.workers=2", log=log)
    try:
        wait_for(lambda: newest_step(folder) >= 1, "a step", run, log)
        in_service(2)
        assert "rollout.workers 2 -> 8" in scale(folder, "rollout.workers=8")
        in_service(8)
        assert len(processes_of(log, "ray::RolloutWorker")) == 8
        assert "rollout.workers 8 -> 2" in scale(folder, "rollout.workers=2")
        in_service(2)
        wait_for(lambda: len(processes_of(log, "ray::RolloutWorker")) == 2, "the end of six processes", run, log)
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=120) == 130, log.read_text()[-4000:]
    finally:
        run.kill()
        run.wait(timeout=30)
    assert {(row["groups_failed"], row["worker_restarts"]) for row in snapshots()} == {(0, 0)}
    assert set(acknowledged(folder).values()) == {1}
    assert_steps_and_versions_go_on(folder, newest_step(folder))
    assert_nothing_is_left(log)


def test_a_run_resumes_after_its_driver_is_killed_and_after_a_full_disk(disk, tmp_path):
    steps = 8
    folder, log = RunFolder((tmp_path if disk is None else disk) / "run"), tmp_path / "log"
    run = start("--run", folder.root, *settings(steps), *QUICK, log=log)
    try:
        wait_for(lambda: newest_step(folder) >= 2, "the second step", run, log)
    finally:
        run.kill()
        run.wait(timeout=30)
    killed_at = newest_step(folder)
    assert_nothing_is_left(log)
    before = acknowledged(folder)

    if disk is not None:
        run = start("--resume", folder.root, log=log)
        try:
            wait_for(lambda: newest_step(folder) >= killed_at + 1, "a step after the killed driver", run, log)
            fill(disk / "filler")
            assert run.wait(timeout=180) == 2, log.read_text()[-4000:]
        finally:
            run.kill()
        said = [line for line in log.read_text().splitlines() if line.startswith("gflowvlm:")]
        assert len(said) == 1, log.read_text()[-4000:]
        assert "No space left" in said[0]
        assert "Traceback" not in log.read_text()
        assert_nothing_is_left(log)
        assert set(before) <= set(acknowledged(folder))
        before = acknowledged(folder)
        (disk / "filler").unlink()

    finish(start("--resume", folder.root, log=log), log, timeout_s=500)
    assert_steps_and_versions_go_on(folder, steps)
    after = acknowledged(folder)
    assert set(before) <= set(after)
    assert set(after.values()) == {1}
    assert_nothing_is_left(log)
    if disk is None:
        pytest.skip("the full disk needs the right to mount a small file system; the rest passed")
