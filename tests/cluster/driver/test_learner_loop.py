"""The learner's loop when its process dies between two of the things that a step leaves behind."""

import json
import os
import threading
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from gflowvlm.actors.adapter_store import AdapterStore
from gflowvlm.cluster.driver import actor_calls, learner_loop
from gflowvlm.cluster.driver.gpu_turns import GpuTurns
from gflowvlm.cluster.driver.learner_loop import LearnerJob, LearnerLoop
from gflowvlm.cluster.driver.learner_reports import Reporter, ReportReceiver
from gflowvlm.cluster.driver.run_record import RunRecord
from gflowvlm.run import log
from gflowvlm.run.checkpoints import checkpoint_steps
from gflowvlm.run.log import RowTail, append_row, read_rows
from gflowvlm.run.preset_library import resolve_config
from gflowvlm.run.setup import new_run
from gflowvlm.run.state import load_state
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import to_record_batch
from gflowvlm.studies.benchmarks.scale_learner import SimulatedLearner
from tests.actors.made_trajectories import make_group
from tests.cluster.driver.local_mailbox import LocalMailbox

STEPS = 4


class Killed(BaseException):
    """The process dies here."""


class MortalLearner(SimulatedLearner):
    """Dies before or after it has written the checkpoint of one step."""

    def __init__(self, dies_at, written):
        super().__init__(step_s=0.0, adapter_kib=1)
        self.dies_at, self.written = dies_at, written

    def save(self, directory: Path) -> None:
        dies = self.steps_taken == self.dies_at
        if self.written or not dies:
            super().save(directory)
        if dies:
            raise Killed


def publish(store: AdapterStore, source: str, step: int, *, keep: bool) -> int:
    return store.publish(Path(source), step, keep=keep)


def call(function):
    """What an actor's method looks like; here the answer is the reference."""
    return SimpleNamespace(remote=function)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with its real adapter store, and a replay buffer that always has the same batch, without Ray."""
    folder = new_run(resolve_config(None, None, [f"learner.steps={STEPS}"]), tmp_path / "run")
    store = AdapterStore(folder.root)
    batch = to_record_batch(make_group(0))
    for module in (learner_loop, actor_calls):
        monkeypatch.setattr(module.ray, "get", lambda answer, timeout: answer)
    alone = SimpleNamespace(get_world_size=lambda: 1)
    monkeypatch.setattr(learner_loop.ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(
        learner_loop,
        "find_adapter_store",
        lambda name: SimpleNamespace(publish=call(partial(publish, store)), newest=call(store.newest)),
    )
    monkeypatch.setattr(learner_loop, "get_buffer", lambda name: SimpleNamespace(wait_sample=call(lambda **_: batch)))
    monkeypatch.setattr(LearnerLoop, "_check_sampler_agrees", lambda self: None)
    return folder


@pytest.fixture
def mailbox(run):
    """A mailbox whose reports a driver writes down."""
    made = LocalMailbox()
    receiver = ReportReceiver(made, RunRecord(run, lambda step: step % 2 == 0).append_report)
    receiver.start()
    yield made
    receiver.close()
    made.close()


@pytest.fixture
def learn(run, mailbox):
    """Starts a learner, that may die at a step."""

    def learn(dies_at=None, written=False, settings=()):
        config = resolve_config(None, None, [f"learner.steps={STEPS}", *settings])
        values = config.model_dump(mode="json")
        job = LearnerJob(values, "model", str(run.root), "store", "buffer", "server", "mailbox")
        LearnerLoop(job, run, 0, MortalLearner(dies_at, written), Reporter(mailbox), GpuTurns(None)).run()

    return learn


@pytest.mark.parametrize("dies_at", [1, 2, STEPS])
def test_a_step_whose_checkpoint_was_not_written_is_taken_again_and_none_is_missing_from_the_log(run, learn, dies_at):
    with pytest.raises(Killed):
        learn(dies_at)
    learn()
    assert [row["step"] for row in read_rows(run.metrics) if row["kind"] == "step"] == list(range(1, STEPS + 1))
    written = [row for row in RowTail(run.metrics).new_rows() if row["kind"] in ("learner", "step")]
    assert [row["step"] for row in written] == [
        0,
        *range(1, dies_at + 1),
        dies_at - 1,
        *range(dies_at, STEPS + 1),
    ]
    versions = [row["version"] for row in written]
    assert versions == sorted(set(versions)), "a version stands for two different adapters"
    assert max(checkpoint_steps(run.checkpoints)) == STEPS


def test_a_learner_that_dies_right_after_its_checkpoint_leaves_that_step_in_the_log(run, learn):
    with pytest.raises(Killed):
        learn(dies_at=3, written=True)
    assert max(checkpoint_steps(run.checkpoints)) == 3
    learn()
    written = [row for row in RowTail(run.metrics).new_rows() if row["kind"] in ("learner", "step")]
    assert [row["step"] for row in written] == [0, 1, 2, 3, 3, 4]


def test_what_a_checkpoint_takes_counts_as_time_of_the_next_step(run, learn, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(learner_loop.time, "monotonic", lambda: now[0])
    save = MortalLearner.save

    def slow_save(self, directory):
        now[0] += 5.0
        save(self, directory)

    monkeypatch.setattr(MortalLearner, "save", slow_save)
    learn()
    times = [row["step_s"] for row in read_rows(run.metrics) if row["kind"] == "step"]
    assert times == [0.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize(("loss", "dies_at", "kept"), [("var_tb", 4, []), ("ppo", 3, [1, 2]), ("grpo", 3, [1, 2])])
def test_on_policy_no_more_than_one_step_is_ever_undone(run, learn, loss, dies_at, kept):
    # More would be learned again from one and the same batch, which policies have played that are undone.
    alone = ["rollout.epsilon=0", "rollout.expert_on_failure=false"]
    with pytest.raises(Killed):
        learn(dies_at, settings=[f"objective.loss={loss}", "learner.checkpoint_every=4", *alone])
    assert list(checkpoint_steps(run.checkpoints)) == kept


def test_the_last_steps_are_published_too_where_they_are_no_multiple(run, learn):
    learn(settings=["learner.publish_every=3"])
    versions = {row["step"]: row["version"] for row in read_rows(run.metrics) if row["kind"] == "step"}
    assert versions == {1: 0, 2: 0, 3: 1, 4: 2}
    assert AdapterStore(run.root).versions() == [1, 2]


def test_every_step_of_a_checkpoint_is_in_the_log_and_its_evaluation_in_the_state_before_it(run, learn, monkeypatch):
    save, checked = MortalLearner.save, []

    def look_and_save(self, directory):
        rows = [row["step"] for row in read_rows(run.metrics) if row["kind"] == "step"]
        assert rows[-1] == self.steps_taken
        checked.append(sorted(load_state(run).due))
        save(self, directory)

    monkeypatch.setattr(MortalLearner, "save", look_and_save)
    learn()
    assert checked == [[], [2], [2], [2, 4]]


class Clients:
    """A file system on which each machine appends where it believes the end to be, as NFS does."""

    def __init__(self, monkeypatch):
        self.ends = {}
        monkeypatch.setattr(log, "os", self)

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags, mode=0o777):
        descriptor = os.open(path, flags & ~os.O_APPEND, mode)
        self.ends.setdefault(machine.get(), os.fstat(descriptor).st_size)
        return descriptor

    def write(self, descriptor, data):
        written = os.pwrite(descriptor, data, self.ends[machine.get()])
        self.ends[machine.get()] += written
        return written


machine = ContextVar("machine", default="the driver's")


def test_no_row_is_lost_to_two_machines_that_write_into_one_folder_where_appends_are_not_atomic(
    run, mailbox, learn, monkeypatch
):
    Clients(monkeypatch)
    append_row(run.metrics, "rollout", {"step": 0})

    def on_the_learners_machine():
        machine.set("the learner's")
        learn()

    learner = threading.Thread(target=on_the_learners_machine)
    learner.start()
    learner.join(timeout=60)
    append_row(run.metrics, "rollout", {"step": STEPS})
    rows = [(row["kind"], row["step"]) for row in RowTail(run.metrics).new_rows()]
    steps = [("step", step) for step in range(1, STEPS + 1)]
    assert rows == [("rollout", 0), ("learner", 0), *steps, ("rollout", STEPS)]

    # The same file system does lose rows where two machines append to one file.
    machine.set("a third one")
    append_row(run.metrics, "step", {"step": 1})
    machine.set("the driver's")
    append_row(run.metrics, "rollout", {"step": 1})
    assert len(RowTail(run.metrics).new_rows()) < len(rows) + 2


class FullDisk:
    """The mailbox of a driver that can write nothing down."""

    def report(self, report):
        raise UserError("metrics.jsonl: cannot be written (No space left on device)")


def test_a_learner_whose_reason_cannot_be_written_still_ends_and_is_not_started_again(tmp_path, monkeypatch, capfd):
    alone = SimpleNamespace(get_world_size=lambda: 1, get_world_rank=lambda: 0)
    monkeypatch.setattr(learner_loop.ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(learner_loop.RemoteMailbox, "find", lambda name: FullDisk())
    values = RunConfig().model_dump(mode="json")
    job = LearnerJob(values, "/no/such/model", str(tmp_path), "store", "buffer", "server", "mailbox")
    learner_loop.learner_loop(vars(job))
    said = capfd.readouterr().err
    assert "/no/such/model" in said
    assert "cannot be written" in said


def test_versions_that_are_evaluated_say_so_also_between_two_publications():
    config = resolve_config(
        None, None, ["learner.steps=10", "learner.publish_every=2", "evaluation.every=3", "learner.warmup_steps=1"]
    )
    # Evaluated after the steps 3, 6, 9 and 10, by what was published at 2, 6, 8 and 10.
    assert [step for step in range(1, 11) if step % 2 == 0 and config.is_evaluated(step)] == [2, 6, 8, 10]
    # A learner that starts again at a step publishes there; what it evaluates later is of that adapter.
    assert [step for step in range(1, 11) if config.is_evaluated(step, at_start=True)] == [2, 8]


def test_a_learner_publishes_its_step_and_leaves_nothing_beside_its_versions(run, learn):
    learn()
    published = [json.loads((path / "publication.json").read_text()) for path in sorted(run.adapters.iterdir())]
    assert [publication["step"] for publication in published] == list(range(1, STEPS + 1))
    assert [publication["keep"] for publication in published] == [False] * (STEPS - 1) + [True]
    assert not list(run.root.glob("adapter-*"))


def test_starting_again_at_an_evaluated_step_keeps_no_second_adapter_of_it_for_ever(run, learn):
    learn()
    for _ in range(2):
        learn()
    published = [json.loads((path / "publication.json").read_text()) for path in sorted(run.adapters.iterdir())]
    assert [(p["step"], p["keep"]) for p in published[STEPS:]] == [(STEPS, False)] * 2


@pytest.mark.parametrize(("gpus", "chosen"), [(0.0, []), (1.0, ["cuda:1"])])
def test_a_learner_takes_a_gpu_only_where_it_asked_for_one(tmp_path, monkeypatch, gpus, chosen):
    # What Ray Train answers on a node with GPUs, which it does not hide from those that asked for none.
    given = "cuda:1" if gpus > 0 else "cpu"
    taken = []
    monkeypatch.setattr(learner_loop.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(learner_loop.torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(learner_loop.ray.train.torch, "get_device", lambda: given)
    alone = SimpleNamespace(get_world_size=lambda: 1, get_world_rank=lambda: 0)
    monkeypatch.setattr(learner_loop.ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(learner_loop, "Learner", lambda *_, **__: SimulatedLearner(step_s=0.0, adapter_kib=1))
    monkeypatch.setattr(learner_loop, "LearnerLoop", lambda *_: SimpleNamespace(run=lambda: None))
    monkeypatch.setattr(learner_loop.RemoteMailbox, "find", lambda name: FullDisk())
    values = resolve_config(None, None, [f"learner.gpus_per_worker={gpus}"]).model_dump(mode="json")
    learner_loop.learner_loop(vars(LearnerJob(values, "m", str(tmp_path), "store", "buffer", "server", "mailbox")))
    assert taken == chosen
