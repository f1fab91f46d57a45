import contextlib
import threading
import time
from pathlib import Path

import pytest

from gflowvlm.cluster.monitoring.telemetry import Telemetry
from gflowvlm.shared.metrics import ALL_METRICS
from tests.small_disks import small_disk

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_every_metric_is_documented_and_named_once():
    text = DOCS.read_text()
    assert [spec.name for spec in ALL_METRICS if f"| `{spec.name}` | {spec.unit} |" not in text] == []
    assert len({spec.name for spec in ALL_METRICS}) == len(ALL_METRICS)


def test_ray_takes_the_text_of_every_metric():
    assert [spec for spec in ALL_METRICS if not (spec.name + spec.unit + spec.description).isascii()] == []


@pytest.fixture
def full_disk(tmp_path):
    with small_disk(tmp_path / "full", "4k") as folder:
        if folder is None:
            pytest.skip("needs the right to mount a small file system")
        yield folder


@pytest.fixture
def shown(monkeypatch):
    """What threads show that end by an exception."""
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    return seen


def send_for(telemetry, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        telemetry.send("train", {"loss": 1.0}, 1)


def test_a_full_disk_is_raised_where_figures_are_sent_and_not_shown_by_the_writing_thread(full_disk, shown):
    telemetry = Telemetry(full_disk, "run")
    with pytest.raises(OSError, match="No space left"):
        send_for(telemetry, 60.0)
    with contextlib.suppress(OSError):
        telemetry.close()
    assert shown == []


def test_other_threads_still_show_what_ends_them(tmp_path, shown):
    def fail():
        raise RuntimeError("a defect")

    telemetry = Telemetry(tmp_path, "run")
    for _ in range(2):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        telemetry.close()
    assert [str(failed.exc_value) for failed in shown] == ["a defect", "a defect"]
