"""The mailbox of a learner's reports as the Ray actor that it is."""

import threading
import time

import pytest
import ray

from gflowvlm.cluster.driver.learner_reports import STEP, RemoteMailbox, Reporter, ReportReceiver, start_mailbox
from gflowvlm.shared.errors import UserError
from tests.actors.local_ray import local_ray

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with local_ray(num_cpus=2):
        yield


def test_reports_come_in_order_and_once_while_the_mailbox_is_killed_again_and_again():
    handle, written = start_mailbox("killed-mailbox"), []
    receiver = ReportReceiver(RemoteMailbox(handle), written.append)
    receiver.start()
    reporter, steps = Reporter(RemoteMailbox.find("killed-mailbox")), 60

    def report():
        for step in range(1, steps + 1):
            reporter.send(STEP, {"step": step})
            time.sleep(0.1)

    learner = threading.Thread(target=report)
    learner.start()
    for killed in range(1, 4):
        deadline = time.monotonic() + 60
        while len(written) < 15 * killed and time.monotonic() < deadline:
            time.sleep(0.02)
        ray.kill(handle, no_restart=False)
    learner.join(timeout=120)
    assert not learner.is_alive()
    receiver.close()
    assert [report.content["step"] for report in written] == list(range(1, steps + 1))


def test_a_refusal_is_a_users_error_on_the_learners_side_too():
    def append_report(report):
        raise UserError("metrics.jsonl: cannot be written (No space left on device)")

    receiver = ReportReceiver(RemoteMailbox(start_mailbox("full-mailbox")), append_report)
    receiver.start()
    with pytest.raises(UserError, match="No space left on device"):
        Reporter(RemoteMailbox.find("full-mailbox")).send(STEP, {"step": 1})
    receiver.close()
