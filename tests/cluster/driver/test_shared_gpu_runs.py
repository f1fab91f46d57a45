"""Runs whose sampler and learner take turns, as they do on one GPU; here both compute on the CPU."""

import signal

import pytest

from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import read_rows
from tests.whole_runs import (
    assert_nothing_is_left,
    assert_steps_and_versions_go_on,
    finish,
    newest_step,
    processes_of,
    start,
    wait_for,
)

STEPS = 5
SETTINGS = [
    f"learner.steps={STEPS}",
    "learner.groups_per_batch=2",
    "rollout.group_size=4",
    "rollout.groups_per_worker=2",
    "evaluation.every=2",
    "evaluation.instances=2",
    "evaluation.samples=2",
    "evaluation.at_start=false",
    "cluster.dashboard=false",
    "sampler.engine=transformers",
    "sampler.sleep_level=1",
    "learner.offload=true",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_whose_learner_is_killed_in_its_turn_goes_on_and_loses_nothing(tmp_path):
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    run = start("--run", folder.root, *SETTINGS, log=log)
    try:
        wait_for(lambda: newest_step(folder) >= 2, "the second step", run, log)
        learner = next(row["pid"] for row in read_rows(folder.metrics) if row["kind"] == "learner")
        (process,) = [p for p in processes_of(log) if p.pid == learner]
        process.send_signal(signal.SIGKILL)
        finish(run, log)
    finally:
        run.kill()
    assert_nothing_is_left(log)
    assert_steps_and_versions_go_on(folder, STEPS)
    rows = read_rows(folder.metrics)
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(0.0 < row["sampler_sleep_s"] < row["step_s"] for row in steps)
    assert max(row["mismatch_max"] for row in steps if row["staleness_max"] == 0) < 1e-4
    assert len([row for row in rows if row["kind"] == "report"]) == 4
    assert max(row["groups_failed"] for row in rows if row["kind"] == "rollout") == 0
