"""Chaos: what is killed is a function of the seed, and every check of the proof fails where its records are wrong."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from chaos.__main__ import chaos, main, parse, parts_of
from chaos.job import GROUP
from chaos.killing import KILL, JobFiles, kill_one
from chaos.nodes import MARK, LocalCluster, Node, end_processes, marked, node_environment
from chaos.proof import Check, deviation_of_difference, prove, same_success
from chaos.records import Records, read_records
from chaos.report import as_json, as_text, recoveries, slowdown
from chaos.schedule import ENGINE, HEAD, NETWORK, NODE, PARTS, Kill, schedule

from gflowvlm.actors.trajectory_files import TrajectoryFiles
from gflowvlm.run.adapters import adapter_versions
from gflowvlm.run.log import append_row
from gflowvlm.run.preset_library import resolve_config
from gflowvlm.run.setup import new_run
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import Trajectory, to_record_batch
from tests.actors.made_trajectories import make_group

STEPS, GROUP_SIZE = 4, 2


def test_the_same_seed_gives_the_same_kills_and_another_seed_others() -> None:
    assert schedule(3, 20, 60) == schedule(3, 20, 60)
    assert schedule(3, 20, 60) != schedule(4, 20, 60)


@pytest.mark.parametrize("seed", range(5))
def test_kills_come_in_order_within_the_run_and_no_part_twice_before_all_others(seed: int) -> None:
    plan = schedule(seed, 50, 60)
    steps = [kill.step for kill in plan]
    assert len(plan) == 50
    assert steps == sorted(steps)
    assert min(steps) >= 1
    assert max(steps) <= 58
    for start in range(0, 49, len(PARTS)):
        whole_round = [kill.part.name for kill in plan[start : start + len(PARTS)]]
        assert len(whole_round) == len(set(whole_round))


def test_a_run_without_an_engine_process_has_none_killed_and_a_short_run_is_refused() -> None:
    parts = tuple(part for part in PARTS if part != ENGINE)
    assert ENGINE not in {kill.part for kill in schedule(0, 30, 10, parts)}
    with pytest.raises(ValueError, match="nothing to disturb"):
        schedule(0, 1, 2)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, f"waited 20 s for {what}"
        time.sleep(0.02)


@pytest.fixture
def titled() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(title: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(["/bin/bash", "-c", f"exec -a '{title}' sleep 60"])
        started.append(process)
        until(lambda: " ".join(psutil.Process(process.pid).cmdline()).startswith(title), title)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=10)


def test_the_picked_process_is_killed_and_no_other(titled: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    first, second = titled("ray::RolloutWorker.sample"), titled("ray::RolloutWorker")
    victims = [psutil.Process(process.pid) for process in (first, second)]
    kill = Kill(1, 0.0, PARTS[0], pick=0.9)
    assert kill_one(victims, kill) == second.pid
    assert second.wait(timeout=10) == -9
    assert first.poll() is None
    assert kill_one([], kill) is None


def test_a_node_finds_its_processes_by_title_and_the_mark_finds_those_left(tmp_path: Path) -> None:
    script = "exec -a ray::ReplayBufferActor sleep 60 & exec -a raylet sleep 60 & wait"
    environment = node_environment(os.environ, tmp_path)
    root = subprocess.Popen(["/bin/bash", "-c", script], env=environment)
    node = Node("node-0", root, tmp_path / "log")
    try:
        until(lambda: len(node.processes("ray::ReplayBufferActor")) == 1, "the buffer's title")
        until(lambda: len(marked(tmp_path)) == 3, "three marked processes")
        found = node.processes("ray::ReplayBufferActor")
        assert [process.ppid() for process in found] == [root.pid]
        assert node.processes("ray::RolloutWorker") == []
    finally:
        end_processes(marked(tmp_path), 0.1)
        root.wait(timeout=10)
    assert marked(tmp_path) == []


def test_a_cluster_is_not_given_the_ray_settings_of_the_shell() -> None:
    environment = node_environment({"RAY_ADDRESS": "other:6379", "HOME": "/home"}, Path("/tmp/x"))
    assert "RAY_ADDRESS" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert (environment["HOME"], environment[MARK]) == ("/home", "/tmp/x")


def is_step(row: dict[str, object], step: int) -> bool:
    return (row["kind"], row.get("step")) == ("step", step)


class MadeRun:
    """A run's folder as a run writes it: two groups a step, one of them before the learner's restart at step 2."""

    def __init__(self, out: Path) -> None:
        self.files = JobFiles.under(out, "disturbed")
        self.folder = new_run(
            resolve_config(None, None, [f"learner.steps={STEPS}", f"rollout.group_size={GROUP_SIZE}"]),
            self.files.run.root,
        )
        trajectories = TrajectoryFiles(self.folder.trajectories)
        version = accepted = 0
        self.learner(0, 0)
        for step in range(1, STEPS + 1):
            for index in (2 * step, 2 * step + 1):
                group = make_group(index, GROUP_SIZE, version=version)
                self.write(trajectories, group)
                self.acknowledge(group)
                accepted += GROUP_SIZE
            append_row(self.folder.metrics, "rollout", {"accepted": accepted})
            version += 1
            self.step(step, version)
            if step == 2:
                append_row(self.files.kills, KILL, {"number": 1, "step": 2, "part": "learner", "pid": 1, "time": 12.5})
                version += 1
                self.learner(1, version)
                version += 1
                self.step(2, version)
        for number in range(1, version + 1):
            self.folder.adapter(number).mkdir()
        self.summarise(0.5)

    def step(self, step: int, version: int) -> None:
        append_row(self.folder.metrics, "step", {"step": step, "version": version, "time": 10.0 + step})

    def learner(self, step: int, version: int) -> None:
        append_row(self.folder.metrics, "learner", {"step": step, "version": version, "time": 10.0})

    def write(self, files: TrajectoryFiles, trajectories: list[Trajectory]) -> None:
        files.append(to_record_batch(trajectories))

    def acknowledge(self, trajectories: list[Trajectory]) -> None:
        ids = [trajectory.trajectory_id for trajectory in trajectories]
        append_row(self.files.ledger, GROUP, {"group_id": trajectories[0].group_id, "trajectory_ids": ids})

    def summarise(self, success: float, steps: int = STEPS) -> None:
        report = [{"split": s, "version": v, "success": success * v / 5} for s in ("id", "ood") for v in (0, 5)]
        self.folder.summary.write_text(json.dumps({"steps": steps, "version": 5, "wall_s": 20.0, "report": report}))

    def edit_log(self, change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
        rows = [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]
        self.folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))

    def records(self) -> Records:
        return read_records(self.files)

    def failed(self, kills: int = 1, status: int = 0) -> dict[str, str]:
        return {
            check.name: "; ".join(check.problems) for check in prove(self.records(), kills, status) if check.problems
        }


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path)


def test_a_run_whose_records_are_right_passes_every_check(made: MadeRun) -> None:
    checks = prove(made.records(), kills=1, status=0)
    assert [check for check in checks if not check.holds] == []
    seen = {check.name: check.seen for check in checks}
    assert seen["no acknowledged trajectory is lost"] == "16 acknowledged"
    assert seen["learner steps have no gap"] == "4 steps, 1 restarts of the learner, 1 steps done again"


def test_a_missing_kill_a_bad_end_and_a_missing_end_are_seen(made: MadeRun) -> None:
    assert list(made.failed(kills=2)) == ["every kill was made"]
    assert made.failed(status=2) == {"the run ended well": "exit status 2"}
    made.summarise(0.5, steps=3)
    assert made.failed() == {"the run ended well": "summary.json: 3 of 4 steps"}
    made.folder.summary.unlink()
    assert list(made.failed()) == ["the run ended well"]


def test_an_acknowledged_trajectory_that_is_not_on_disk_is_lost(made: MadeRun) -> None:
    newest = max(made.folder.trajectories.iterdir())
    newest.unlink()
    failed = made.failed()
    assert "2 acknowledged, not on disk" in failed["no acknowledged trajectory is lost"]
    # What the buffer itself has counted is missed too.
    assert "16 counted, 14 on disk" in failed["the replay buffer's count never falls"]


def test_a_run_that_acknowledged_nothing_proves_nothing(made: MadeRun) -> None:
    made.files.ledger.unlink()
    assert made.failed() == {"no acknowledged trajectory is lost": "nothing was acknowledged"}


def test_a_trajectory_in_two_files_is_doubled(made: MadeRun) -> None:
    made.write(TrajectoryFiles(made.folder.trajectories), make_group(3, GROUP_SIZE))
    assert list(made.failed()) == ["no trajectory is doubled"]


def test_a_group_of_which_a_part_is_written_is_seen(made: MadeRun) -> None:
    made.write(TrajectoryFiles(made.folder.trajectories), make_group(99, GROUP_SIZE)[:1])
    assert made.failed() == {"groups are whole": "g00000099-0a has 1 of 2"}


def test_the_experts_trajectory_is_extra_to_its_group(made: MadeRun) -> None:
    made.write(TrajectoryFiles(made.folder.trajectories), make_group(99, GROUP_SIZE, expert=True))
    assert made.failed() == {}


def test_a_replay_buffer_that_comes_back_without_what_it_held_is_seen(made: MadeRun) -> None:
    append_row(made.folder.metrics, "rollout", {"accepted": 4})
    assert made.failed() == {"the replay buffer's count never falls": "fell from 16 to 4"}


@pytest.mark.parametrize(
    ("step", "problem"),
    [(1, "step 2 follows step 0"), (3, "step 4 follows step 2"), (4, "the last step is 3 of 4")],
)
def test_a_step_that_is_missing_from_the_log_is_seen(made: MadeRun, step: int, problem: str) -> None:
    made.edit_log(lambda rows: [row for row in rows if not is_step(row, step)])
    assert problem in made.failed()["learner steps have no gap"]


def test_a_learner_that_goes_on_behind_a_step_nobody_logged_is_seen(made: MadeRun) -> None:
    made.edit_log(lambda rows: [{**r, "step": 3} if r["kind"] == "learner" and r["step"] == 1 else r for r in rows])
    assert "the learner started at step 3, the log ends at step 2" in made.failed()["learner steps have no gap"]


def test_a_learner_that_goes_back_behind_its_checkpoint_is_seen(made: MadeRun) -> None:
    made.edit_log(lambda rows: [{**r, "step": 0} if r["kind"] == "learner" else r for r in rows])
    assert "started at step 0 after step 2: older than a checkpoint" in made.failed()["learner steps have no gap"]


@pytest.mark.parametrize("version", [3, 4])
def test_a_version_that_falls_or_stays_is_seen(made: MadeRun, version: int) -> None:
    made.edit_log(lambda rows: [{**r, "version": version} if is_step(r, 3) else r for r in rows])
    assert made.failed() == {"policy versions are monotone": f"version {version} at step 3 (step) after 4 at step 2"}


def test_a_version_without_an_adapter_is_seen(made: MadeRun) -> None:
    made.folder.adapter(4).rmdir()
    assert made.failed() == {"every version exists": "adapters that are kept are missing: 4"}
    for path in made.folder.adapters.iterdir():
        path.rmdir()
    assert "steps name versions without an adapter: 1, 2, 4, 5, 6" in made.failed()["every version exists"]


def test_a_removed_adapter_is_no_gap_unless_it_is_evaluated_or_among_the_newest(made: MadeRun) -> None:
    config = made.folder.config
    config.write_text(config.read_text().replace("keep_adapters: 8", "keep_adapters: 2"))
    made.folder.adapter(1).rmdir()
    assert made.failed() == {}
    made.edit_log(lambda rows: [*rows, {"kind": "evaluation", "step": 1, "version": 1, "time": 0.0}])
    assert made.failed() == {"every version exists": "adapters that are kept are missing: 1"}
    made.edit_log(lambda rows: [r for r in rows if r["kind"] != "evaluation"])
    before_last = max(adapter_versions(made.folder)) - 1
    made.folder.adapter(before_last).rmdir()
    assert made.failed() == {"every version exists": f"adapters that are kept are missing: {before_last}"}


def test_a_trajectory_of_a_version_that_nobody_published_is_seen(made: MadeRun) -> None:
    made.write(TrajectoryFiles(made.folder.trajectories), make_group(99, GROUP_SIZE, version=77))
    assert made.failed() == {"every version exists": "a trajectory names version 77, which has no adapter"}


def test_final_success_may_differ_by_noise_and_no_more(made: MadeRun) -> None:
    disturbed = made.records()
    assert same_success(disturbed, disturbed).holds
    worse = replace(disturbed, summary=json.loads(json.dumps(disturbed.summary).replace("0.5", "0.05")))
    assert not same_success(worse, disturbed).holds
    assert not same_success(disturbed, replace(disturbed, summary=None)).holds
    # Two shares of 20 instances each: sqrt(2 * 0.5 * 0.5 / 20).
    assert deviation_of_difference(0.5, 0.5, 20) == pytest.approx(0.1581, abs=1e-4)
    assert deviation_of_difference(1.0, 1.0, 20) > 0.0


def test_the_report_has_every_check_kill_and_ratio(made: MadeRun) -> None:
    records = made.records()
    (recovery,) = recoveries(records)
    assert (recovery.part, recovery.seconds) == ("learner", 0.5)
    twice = replace(records, summary={**(records.summary or {}), "wall_s": 40.0})
    assert slowdown(twice, records) == {"learning": 1.0, "wall": 2.0}
    found = as_json({"kills": 1}, [Check("a", "b"), Check("c", "d", ["e"])], twice, records)
    assert found["holds"] is False
    assert json.loads(json.dumps(found))["times_as_long"]["wall"] == 2.0
    text = as_text(found)
    assert "| c | d | **NO**: e |" in text
    assert "| 1 | 2 | learner | 0.5 |" in text
    assert "wall 2.00" in text


def test_settings_that_cannot_be_disturbed_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learner.steps=2"]) == 2
    assert capsys.readouterr().err.startswith("chaos: learner.steps: ")
    with pytest.raises(UserError, match="no_such_key"):
        chaos(parse(["no_such_key=1"]))


def test_only_the_parts_that_are_named_are_killed_and_one_that_is_not_there_is_named() -> None:
    named = parse(["--only", "learner", "--only", "worker node"])
    assert [part.name for part in parts_of(named, "vllm")] == ["learner", "worker node"]
    assert parts_of(parse([]), "vllm") == PARTS
    assert set(PARTS) - set(parts_of(parse([]), "transformers")) == {ENGINE}
    assert set(parts_of(parse(["--head"]), "vllm")) - set(PARTS) == {NETWORK, HEAD}
    with pytest.raises(UserError, match=r"--only 'head': there are rollout worker, .*options of their own"):
        parts_of(parse(["--only", "head"]), "vllm")


def test_worker_nodes_are_the_only_nodes_that_are_killed() -> None:
    assert [part for part in PARTS if part.title is None] == [NODE]


@pytest.mark.slow
def test_a_worker_node_is_lost_and_replaced_and_nothing_is_left_of_the_cluster(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, "run", workers=1, cpus=1) as cluster:
        (lost,) = cluster.workers
        pid = cluster.kill_worker(lost)
        assert cluster.workers == []
        assert not psutil.pid_exists(pid)
        assert lost.family() == []
        cluster.add_worker()
        assert [node.raylet() is not None for node in cluster.nodes] == [True, True]
        folder = cluster.folder
        assert len(marked(folder)) > 2
    assert marked(folder) == []
    assert not folder.exists()
