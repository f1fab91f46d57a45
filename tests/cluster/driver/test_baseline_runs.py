"""The baselines in whole runs: what the actors, the buffer and the learner do differently for them."""

import json
import signal
from statistics import median

import pytest

from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import read_rows
from gflowvlm.run.state import load_state, save_state
from gflowvlm.shared.trajectory import from_arrow, read_parquet
from tests.whole_runs import (
    acknowledged,
    assert_nothing_is_left,
    assert_steps_and_versions_go_on,
    finish,
    newest_step,
    start,
    wait_for,
)

STEPS = 8
SETTINGS = [
    f"learner.steps={STEPS}",
    f"evaluation.every={STEPS}",
    "evaluation.instances=1",
    "evaluation.samples=2",
    "rollout.workers=1",
    "rollout.group_size=2",
    "sampler.engine=transformers",
    "cluster.dashboard=false",
    "evaluation.at_start=false",
]

STEP_PARTS = ("wait_s", "publish_s", "seconds_reference", "seconds_scoring", "seconds_loss", "seconds_backward")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def recorded(folder):
    """The run's trajectories, group after group as they were made."""
    return [t for path in sorted(folder.trajectories.glob("*.parquet")) for t in from_arrow(read_parquet(path))]


def forget_evaluations(folder):
    """Leaves the run as an interruption does that comes before any evaluation has been played."""
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    folder.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows if row["kind"] != "evaluation"))
    due = {row["step"]: row["version"] for row in rows if row["kind"] == "step" and row["step"] % 2 == 0}
    save_state(folder, load_state(folder).model_copy(update={"due": due, "evaluated": frozenset()}))
    folder.best.unlink(missing_ok=True)


def test_ppo_learns_each_trajectory_once_from_the_policy_that_made_it_over_ctrl_c_and_resume_too(tmp_path):
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    run = start("--run", folder.root, *SETTINGS, "objective.loss=ppo", "evaluation.every=2", log=log)
    try:
        wait_for(lambda: newest_step(folder) >= 3, "the third step", run, log)
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=180) == 130, log.read_text()[-4000:]
    finally:
        run.kill()
    assert "--resume" in log.read_text()
    assert_nothing_is_left(log)
    before = acknowledged(folder)
    forget_evaluations(folder)
    finish(start("--resume", folder.root, log=log), log)

    assert_steps_and_versions_go_on(folder, STEPS)
    evaluated = {r["step"]: r["version"] for r in read_rows(folder.metrics) if r["kind"] == "evaluation"}
    versions = {r["step"]: r["version"] for r in read_rows(folder.metrics) if r["kind"] == "step"}
    assert evaluated == {step: versions[step] for step in (2, 4, 6, 8)}
    steps = [r for r in read_rows(folder.metrics) if r["kind"] == "step"]
    assert [r["trajectories"] for r in steps] == [4.0] * STEPS
    assert all(r["updated"] == 1.0 for r in steps)
    after = acknowledged(folder)
    assert set(before) <= set(after)
    assert set(after.values()) == {1}
    trajectories = recorded(folder)
    assert not any(t.expert for t in trajectories)
    # Each step's trajectories were made by one version. What an interruption left unlearned is the newest still
    # and is learned first; it was made by the version before the one that is published again on resuming.
    assert all(len({step.policy_version for step in t.steps}) == 1 for t in trajectories)
    assert all(r["staleness_max"] == 0 for r in steps if r["step"] <= 3)
    assert max(r["staleness_max"] for r in steps) <= 1


def test_sft_learns_from_what_the_expert_plays(tmp_path):
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    finish(start("--run", folder.root, *SETTINGS, "objective.loss=sft", log=log), log)
    assert_steps_and_versions_go_on(folder, STEPS)
    trajectories = recorded(folder)
    assert len(trajectories) >= STEPS * 4
    assert all(t.expert and t.success for t in trajectories)
    steps = [r for r in read_rows(folder.metrics) if r["kind"] == "step"]
    assert sum(r["loss"] for r in steps[-2:]) < sum(r["loss"] for r in steps[:2])
    # Small steps follow each other at once: the learner waits for nothing but its batches.
    assert median(r["step_s"] - sum(r[part] for part in STEP_PARTS) for r in steps) < 0.5
