import errno
import json
import os

import pytest

from gflowvlm.run.log import RowTail, append_row, read_rows
from gflowvlm.shared.errors import UserError


def test_rows_come_back_in_order(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert read_rows(log) == []
    append_row(log, "step", {"step": 1, "loss": 2.0})
    append_row(log, "evaluation", {"step": 1, "success": 0.5})
    assert [(r["kind"], r["step"]) for r in read_rows(log)] == [("step", 1), ("evaluation", 1)]


def test_steps_that_a_restarted_learner_undid_are_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_row(log, "learner", {"step": 0})
    for step in (1, 2, 3):
        append_row(log, "step", {"step": step, "try": 1})
    append_row(log, "learner", {"step": 2})
    append_row(log, "step", {"step": 3, "try": 2})
    steps = [(r["step"], r["try"]) for r in read_rows(log) if r["kind"] == "step"]
    assert steps == [(1, 1), (2, 1), (3, 2)]


def test_a_half_written_row_waits_and_a_broken_one_is_skipped(tmp_path):
    log = tmp_path / "metrics.jsonl"
    tail = RowTail(log)
    assert tail.new_rows() == []
    whole = json.dumps({"kind": "step", "step": 1}) + "\n"
    log.write_text(whole + "\x00garbage\n" + '{"kind": "st')
    assert [r["step"] for r in tail.new_rows()] == [1]
    with log.open("a") as file:
        file.write('ep", "step": 2}\n')
    assert [r["step"] for r in tail.new_rows()] == [2]
    assert tail.new_rows() == []


def test_a_tail_from_the_end_sees_only_what_follows(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_row(log, "step", {"step": 1})
    tail = RowTail(log, from_end=True)
    append_row(log, "step", {"step": 2})
    assert [r["step"] for r in tail.new_rows()] == [2]


def test_a_half_written_last_line_costs_its_own_row_only(tmp_path):
    log = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_row(log, "step", {"step": step})
    whole = log.read_bytes()
    last = len(whole.splitlines()[-1])
    for cut in range(1, last + 1):
        log.write_bytes(whole[:-cut])
        append_row(log, "learner", {"step": 2})
        append_row(log, "step", {"step": 3, "again": True})
        kept = [(1, False), (2, False), (3, False)] if cut == 1 else [(1, False), (2, False)]
        rows = RowTail(log).new_rows()
        assert [(r["step"], "again" in r) for r in rows] == [*kept, (2, False), (3, True)]


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes half of what is written, and nothing more; a switch makes room."""
    real, state = os.write, {"full": True, "taken": False}

    def write(descriptor, data):
        if not state["full"]:
            return real(descriptor, data)
        if state["taken"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        state["taken"] = True
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr("gflowvlm.run.log.os.write", write)
    return state


def test_a_row_that_a_full_disk_takes_half_of_is_an_error_and_leaves_nothing(tmp_path, full_disk):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"kind": "step", "step": 1}\n')
    before = log.read_bytes()
    with pytest.raises(UserError, match=r"No space left on device.*free some space, then resume"):
        append_row(log, "step", {"step": 2})
    assert log.read_bytes() == before
    full_disk["full"] = False
    append_row(log, "step", {"step": 2})
    assert [r["step"] for r in read_rows(log)] == [1, 2]


def test_a_short_write_that_can_go_on_is_gone_on_with(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr("gflowvlm.run.log.os.write", lambda descriptor, data: real(descriptor, data[:7]))
    log = tmp_path / "metrics.jsonl"
    append_row(log, "step", {"step": 1})
    append_row(log, "step", {"step": 2})
    assert [r["step"] for r in read_rows(log)] == [1, 2]


def test_what_a_resume_plays_again_stands_once_in_what_is_read(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_row(log, "learner", {"step": 0})
    append_row(log, "step", {"step": 1})
    for success in (0.25, 0.5):
        # The first one's driver died before it was saved as evaluated.
        append_row(log, "evaluation", {"step": 0, "success": success})
    append_row(log, "evaluation", {"step": 1, "success": 0.75})
    for version in (0, 1):
        append_row(log, "report", {"step": 1, "split": "id", "version": version})
    # Killed in the final report, of which only the other split was missing.
    append_row(log, "learner", {"step": 1})
    for split in ("id", "ood"):
        for version in (0, 1):
            append_row(log, "report", {"step": 1, "split": split, "version": version})
    rows = read_rows(log)
    assert [(r["step"], r["success"]) for r in rows if r["kind"] == "evaluation"] == [(0, 0.5), (1, 0.75)]
    reports = [(r["split"], r["version"]) for r in rows if r["kind"] == "report"]
    assert reports == [("id", 0), ("id", 1), ("ood", 0), ("ood", 1)]
