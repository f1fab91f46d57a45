"""Asking a live run for another size, and what its driver makes of it; the parts that it scales are counted only."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from gflowvlm.cluster.launch.local_capacity import LocalCapacity
from gflowvlm.cluster.launch.placement import Node
from gflowvlm.cluster.scaling.auto_scaling import Load, Size
from gflowvlm.cluster.scaling.run_scaling import RunScaling, describe
from gflowvlm.cluster.scaling.scale_requests import ScaleRequest, ask, parse_request, take_requests
from gflowvlm.run.log import append_row, read_rows
from gflowvlm.run.preset_library import load_preset
from gflowvlm.run.setup import driver_holds, new_run, run_lock
from gflowvlm.shared.errors import UserError

CAPACITY = LocalCapacity(cores=16, free_gib=64.0)
BIG = [Node("n", True, {"CPU": 64.0}, {})]


class Parts:
    """What a run scales; remembers what it was set to."""

    def __init__(self):
        self.set_to, self.refuses = [], None

    def scale_workers(self, workers):
        self.set_to.append(("rollouts", workers))

    def scale_replicas(self, replicas):
        if self.refuses is not None:
            raise UserError(self.refuses)
        self.set_to.append(("samplers", replicas))


class Driver:
    """A driver's loop, as far as scaling goes, in a thread; holds the run as a driver does."""

    def __init__(self, folder, config, nodes=BIG, capacity=CAPACITY):
        self.folder, self.parts, self.said = folder, Parts(), []
        self.scaling = RunScaling(
            folder,
            config,
            self.parts,
            lambda: nodes,
            self.said.append,
            lambda kind, row: append_row(folder.metrics, kind, row),
            lambda: capacity,
        )
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._turn)

    def _turn(self):
        while not self._ends.wait(0.05):
            self.scaling.answer_requests(step=7)

    def __enter__(self):
        self._lock = run_lock(self.folder)
        self._lock.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ends.set()
        self._thread.join(timeout=10)
        self._lock.__exit__(None, None, None)


def run_of(tmp_path, *overrides):
    config = load_preset("numberline-tiny", ["rollout.workers=2", *overrides])
    return new_run(config, tmp_path / "run"), config


def scale_rows(folder):
    return [row for row in read_rows(folder.metrics) if row["kind"] == "scale"]


def test_a_request_is_carried_out_answered_and_logged(tmp_path):
    folder, config = run_of(tmp_path)
    with Driver(folder, config) as driver:
        row = ask(folder, parse_request(["rollout.workers=4", "sampler.replicas=2"]))
        assert describe(row) == "rollout.workers 2 -> 4, sampler.replicas 1 -> 2"
        again = ask(folder, parse_request(["rollout.workers=3"]))
        assert describe(again) == "rollout.workers 4 -> 3, sampler.replicas 2"
        assert driver.scaling.size == Size(3, 2)
        # Replicas that stay as they are are not touched.
        assert driver.parts.set_to == [("samplers", 2), ("rollouts", 4), ("rollouts", 3)]
    assert [(r["step"], r["cause"], r["rollout_workers"], r["sampler_replicas"]) for r in scale_rows(folder)] == [
        (7, "request", 4, 2),
        (7, "request", 3, 2),
    ]
    assert driver.said == ["scaled on request: " + describe(row), "scaled on request: " + describe(again)]
    assert list(folder.root.glob("scale-*")) == []


def test_several_at_once_are_answered_each(tmp_path):
    folder, config = run_of(tmp_path)
    answers = {}
    with Driver(folder, config) as driver:
        askers = [
            threading.Thread(target=lambda n=n: answers.update({n: ask(folder, ScaleRequest(workers=n))}))
            for n in range(3, 9)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(timeout=30)
        last = scale_rows(folder)[-1]
        assert driver.scaling.size.workers == last["rollout_workers"]
    assert {n: row["rollout_workers"] for n, row in answers.items()} == {n: n for n in range(3, 9)}
    befores = [row["rollout_workers_before"] for row in scale_rows(folder)]
    assert befores == [2, *(row["rollout_workers"] for row in scale_rows(folder)[:-1])]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "name what to change"),
        (["workers=4"], "'workers=4': did you mean rollout.workers=4?"),
        (["rollouts=4"], "'rollouts=4': did you mean rollout.workers=4?"),
        (["samplers=2"], "'samplers=2': did you mean sampler.replicas=2?"),
        (["sampler.replica=2"], "'sampler.replica=2': did you mean sampler.replicas=2?"),
        (["learner.steps=2"], "'learner.steps=2': write rollout.workers=N, sampler.replicas=N"),
        (["rollout.workers=2", "rollout.workers=3"], "'rollout.workers=3': write rollout.workers=N"),
        (["rollout.workers=many"], "'rollout.workers=many': must be a whole number"),
        (["rollout.workers"], "'rollout.workers': must be a whole number"),
        (["rollout.workers=2.5"], "'rollout.workers=2.5': must be a whole number"),
        (["rollout.workers=0"], "rollout.workers: input should be greater than or equal to 1, found 0"),
        (["sampler.replicas=257"], "sampler.replicas: input should be less than or equal to 256, found 257"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(changes, said):
    with pytest.raises(UserError) as error:
        parse_request(changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_that_no_driver_runs_is_said_at_once(tmp_path):
    folder, _ = run_of(tmp_path)
    started = time.monotonic()
    with pytest.raises(UserError, match="no driver is running this run; `gflowvlm train --resume"):
        ask(folder, ScaleRequest(workers=4))
    with run_lock(folder):
        pass
    with pytest.raises(UserError, match="no driver is running this run"):
        ask(folder, ScaleRequest(workers=4))
    folder.summary.write_text("{}")
    with pytest.raises(UserError, match="this run has ended"):
        ask(folder, ScaleRequest(workers=4))
    assert time.monotonic() - started < 2
    assert list(folder.root.glob("scale-*")) == []


def test_a_driver_that_does_not_answer_is_waited_for_only_so_long_and_never_finds_the_request(tmp_path):
    folder, _ = run_of(tmp_path)
    with run_lock(folder), pytest.raises(UserError, match=r"waited 0 s for the driver of .* to answer"):
        ask(folder, ScaleRequest(workers=4), timeout_s=0.3)
    assert take_requests(folder) == []


def test_a_driver_that_dies_is_not_waited_for(tmp_path):
    folder, _ = run_of(tmp_path)
    holds = "import sys, time; from pathlib import Path; from gflowvlm.run.setup import *\n"
    holds += "with run_lock(RunFolder(Path(sys.argv[1]))): print('held', flush=True); time.sleep(60)"
    driver = subprocess.Popen(
        [sys.executable, "-c", holds, str(folder.root)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert driver.stdout.readline() == "held\n"
        assert driver_holds(folder) is True
        threading.Timer(0.5, driver.kill).start()
        with pytest.raises(UserError, match="no driver is running this run"):
            ask(folder, ScaleRequest(workers=4))
    finally:
        driver.kill()
        driver.wait(timeout=10)


def test_a_lock_of_another_machine_leaves_it_open_whether_the_run_is_running(tmp_path):
    folder, _ = run_of(tmp_path)
    assert driver_holds(folder) is False
    with run_lock(folder):
        assert driver_holds(folder) is True
    assert driver_holds(folder) is False
    (folder.root / ".lock").write_text("another-machine")
    assert driver_holds(folder) is None
    with pytest.raises(UserError, match="waited 0 s for the driver"):
        ask(folder, ScaleRequest(workers=4), timeout_s=0.2)


def test_files_that_are_no_requests_are_refused_or_left_alone(tmp_path):
    folder, config = run_of(tmp_path)
    broken = {1: "{", 2: '{"workers": 0}', 3: '{"workers": "4"}', 4: '{"other": 4}', 5: "{}", 6: b"\xff\xfe"}
    with Driver(folder, config) as driver:
        (folder.root / "scale-mine.json").write_text("{}")
        (folder.root / f"scale-{7:020d}-00000000.json").mkdir()
        for number, content in broken.items():
            path = folder.root / f"scale-{number:020d}-00000000.json"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        deadline = time.monotonic() + 10
        while len(scale_rows(folder)) < len(broken) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert driver.parts.set_to == []
    rows = scale_rows(folder)
    assert len(rows) == len(broken)
    assert all(row["error"] for row in rows)
    assert {path.name for path in folder.root.glob("scale-*")} == {
        "scale-mine.json",
        f"scale-{7:020d}-00000000.json",
    }


def test_what_an_earlier_driver_was_asked_for_does_not_reach_the_next(tmp_path):
    folder, config = run_of(tmp_path)
    (folder.root / f"scale-{1:020d}-00000000.json").write_text(json.dumps({"workers": 4}))
    with Driver(folder, config) as driver:
        row = ask(folder, ScaleRequest(replicas=2))
    assert describe(row) == "rollout.workers 2, sampler.replicas 1 -> 2"
    assert driver.scaling.size == Size(2, 2)


def test_a_refusal_of_the_policy_server_changes_nothing(tmp_path):
    folder, config = run_of(tmp_path)
    with Driver(folder, config) as driver:
        driver.parts.refuses = "Ray Serve cannot"
        with pytest.raises(UserError, match="Ray Serve cannot"):
            ask(folder, parse_request(["rollout.workers=4", "sampler.replicas=2"]))
        assert driver.parts.set_to == []
        assert driver.scaling.size == Size(2, 1)
    assert scale_rows(folder)[0]["rollout_workers"] == 2


def test_a_run_on_its_own_cluster_refuses_what_it_has_no_room_for_and_one_on_a_cluster_waits_for_nodes(tmp_path):
    small = [Node("n", True, {"CPU": 2.0}, {})]
    folder, config = run_of(tmp_path)
    with Driver(folder, config, small) as driver:
        with pytest.raises(
            UserError, match=r"no room for 1 of 4 policy server replicas \(0.5 CPU\): .*cpus_per_replica"
        ):
            ask(folder, ScaleRequest(replicas=4))
        assert driver.parts.set_to == []
        # The operating system shares the processors of one machine.
        ask(folder, ScaleRequest(workers=8))
        assert driver.parts.set_to == [("rollouts", 8)]
    folder, config = run_of(tmp_path / "far", "cluster.address=auto")
    with Driver(folder, config, small) as driver:
        answer = describe(ask(folder, ScaleRequest(workers=8)))
        assert answer.startswith(
            "rollout.workers 2 -> 8, sampler.replicas 1; no room yet for 4 of 8 rollout workers (0.25 CPU): 1 nodes"
        )
        assert driver.parts.set_to == [("rollouts", 8)]


def test_a_run_on_its_own_cluster_says_how_many_workers_its_machine_has_room_for(tmp_path):
    folder, config = run_of(tmp_path)
    with Driver(folder, config, capacity=LocalCapacity(cores=2, free_gib=10.2)) as driver:
        with pytest.raises(
            UserError, match=r"rollout\.workers=100: this machine has room for 22 \(10\.2 GiB of memory"
        ):
            ask(folder, ScaleRequest(workers=100))
        assert driver.parts.set_to == []
        many = describe(ask(folder, ScaleRequest(workers=20)))
        assert many.startswith(
            "rollout.workers 2 -> 20, sampler.replicas 1; rollout.workers=20 is more than 16, what 2"
        )
        assert many.endswith("their start takes about 1 minutes")
        # What runs already is not counted again, and fewer always fit.
        driver.scaling._capacity = lambda: LocalCapacity(cores=2, free_gib=0.1)
        assert describe(ask(folder, ScaleRequest(workers=19))) == "rollout.workers 20 -> 19, sampler.replicas 1"
    far, config = run_of(tmp_path / "far", "cluster.address=auto")
    with Driver(far, config, capacity=LocalCapacity(cores=1, free_gib=0.0)) as driver:
        ask(far, ScaleRequest(workers=100))
        assert driver.parts.set_to == [("rollouts", 100)]


def test_scaling_by_load_is_logged_with_its_reason_and_keeps_requests_within_its_bounds(tmp_path):
    folder, config = run_of(tmp_path, "scaling.automatic=true", "scaling.patience=2", "scaling.max_workers=6")
    starved = Load(0.9, 0.5, 16, 64, 8, 8, Size(2, 1))
    with Driver(folder, config) as driver:
        driver.scaling.observe(starved, step=3)
        assert scale_rows(folder) == []
        driver.scaling.observe(starved, step=4)
        assert driver.parts.set_to == [("rollouts", 3)]
        with pytest.raises(UserError, match=r"rollout.workers=7: scaling\.automatic keeps this run between 1 and 6"):
            ask(folder, ScaleRequest(workers=7))
        ask(folder, ScaleRequest(workers=5))
        # Also what a person changed has time to show.
        for step in (5, 6, 7):
            driver.scaling.observe(starved, step)
        assert driver.scaling.size == Size(5, 1)
    row = scale_rows(folder)[0]
    assert (row["step"], row["cause"], row["request"], row["rollout_workers"]) == (4, "automatic", None, 3)
    assert row["reason"].startswith("the learner waits 90% of its time")
    assert driver.said[0] == f"scaled by itself: rollout.workers 2 -> 3, sampler.replicas 1 ({row['reason']})"


def test_without_the_setting_the_load_changes_nothing(tmp_path):
    folder, config = run_of(tmp_path)
    driver = Driver(folder, config)
    for step in range(10):
        driver.scaling.observe(Load(0.9, 0.5, 16, 64, 8, 8, Size(2, 1)), step)
    assert driver.parts.set_to == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["scaling.min_workers=5", "scaling.max_workers=4"], "scaling.min_workers must not exceed scaling.max_workers"),
        (["scaling.fewer_below=0.2"], "scaling.fewer_below must be below scaling.more_above"),
        (["scaling.automatic=true", "rollout.workers=9"], r"rollout.workers \(9\) is outside 1 to 8"),
        (["scaling.automatic=true", "sampler.replicas=3"], r"sampler.replicas \(3\) is outside 1 to 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load_preset("numberline-tiny", overrides)
