import json

from gflowvlm.run.log import RowTail, append_row, read_rows


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
