"""What a learner reports reaches the driver in order, none lost and none doubled, whatever is lost between them."""

import threading
import time

import pytest

from gflowvlm.cluster.driver.learner_reports import FATAL, STARTED, STEP, SUPERSEDED, Reporter, ReportReceiver
from gflowvlm.shared.errors import UserError
from tests.cluster.driver.local_mailbox import LocalMailbox


@pytest.fixture
def mailbox():
    made = LocalMailbox()
    yield made
    made.close()


@pytest.fixture
def written():
    """What a driver has written down."""
    return []


@pytest.fixture
def receiver(mailbox, written):
    made = ReportReceiver(mailbox, written.append)
    made.start()
    yield made
    made.close()


def test_a_report_is_answered_once_it_is_written_down_and_not_before(mailbox):
    written, may_write = [], threading.Event()

    def append_report(report):
        assert may_write.wait(timeout=30)
        written.append(report)

    receiver = ReportReceiver(mailbox, append_report)
    receiver.start()
    sender = threading.Thread(target=Reporter(mailbox).send, args=(STEP, {"step": 1}))
    sender.start()
    time.sleep(0.3)
    assert sender.is_alive()
    may_write.set()
    sender.join(timeout=30)
    assert not sender.is_alive()
    assert [report.content for report in written] == [{"step": 1}]
    receiver.close()


def test_reports_come_in_order_and_once_while_mailbox_and_answers_are_lost(mailbox, receiver, written):
    ends = threading.Event()

    def disturb():
        while not ends.wait(0.01):
            mailbox.die()
            mailbox.loses = 1

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        reporter = Reporter(mailbox)
        reporter.send(STARTED, {"step": 0})
        for step in range(1, 101):
            reporter.send(STEP, {"step": step})
    finally:
        ends.set()
        disturbing.join()
    assert [report.content["step"] for report in written] == list(range(101))
    assert [report.content["step"] for report in receiver.new_reports()] == list(range(101))
    assert receiver.new_reports() == []


def test_a_learner_that_another_has_taken_over_from_is_not_heard_any_more(mailbox, receiver):
    cut_off, new = Reporter(mailbox), Reporter(mailbox)
    cut_off.send(STARTED, {"step": 0})
    cut_off.send(STEP, {"step": 1})
    new.send(STARTED, {"step": 1})
    for kind in (STEP, FATAL):
        with pytest.raises(UserError, match=SUPERSEDED):
            cut_off.send(kind, {"step": 2})
    new.send(STEP, {"step": 2})
    assert [(r.kind, r.content["step"]) for r in receiver.new_reports()] == [
        (STARTED, 0),
        (STEP, 1),
        (STARTED, 1),
        (STEP, 2),
    ]


def test_a_second_rank_is_heard_beside_the_first(mailbox, receiver):
    first, second = Reporter(mailbox), Reporter(mailbox)
    first.send(STARTED, {"step": 0})
    second.send(FATAL, {"error": "no room on this GPU"})
    assert [report.kind for report in receiver.new_reports()] == [STARTED, FATAL]


def test_what_cannot_be_written_down_is_told_to_the_learner_and_ends_the_drivers_loop(mailbox):
    def append_report(report):
        raise UserError("metrics.jsonl: cannot be written (No space left on device)")

    receiver = ReportReceiver(mailbox, append_report)
    receiver.start()
    with pytest.raises(UserError, match="No space left"):
        Reporter(mailbox).send(STEP, {"step": 1})
    with pytest.raises(UserError, match="No space left"):
        receiver.new_reports()
    receiver.close()


def test_a_report_that_waits_when_the_driver_stops_is_still_answered(mailbox, written):
    receiver = ReportReceiver(mailbox, written.append)
    sender = threading.Thread(target=Reporter(mailbox).send, args=(STEP, {"step": 1}))
    sender.start()
    time.sleep(0.2)
    receiver.start()
    receiver.close()
    sender.join(timeout=30)
    assert not sender.is_alive()
    assert len(written) == 1


def test_a_defect_in_the_receiving_thread_does_not_stay_unseen(mailbox, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    receiver = ReportReceiver(mailbox, {}.__getitem__)
    receiver.start()
    sender = threading.Thread(target=Reporter(mailbox).send, args=(STEP, {"step": 1}))
    sender.start()
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="has ended"):
        receiver.new_reports()
    next_one = ReportReceiver(mailbox, [].append)
    next_one.start()
    sender.join(timeout=30)
    assert not sender.is_alive()
    next_one.close()
