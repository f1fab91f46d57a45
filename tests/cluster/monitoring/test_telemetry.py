import contextlib
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gflowvlm.cluster.monitoring.telemetry import Telemetry, as_tag
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


def shown_curve(directory, tag="train/loss"):
    """What TensorBoard shows of a figure: (step, value)."""
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def row(kind, step, **values):
    return {"kind": kind, "time": 1000.0 + step, "step": step, **values}


def test_what_a_resume_undid_is_undone_in_tensorboard_and_what_a_killed_driver_had_not_flushed_is_there(tmp_path):
    killed = Telemetry(tmp_path, "run")
    for step in range(1, 9):
        killed.send("train", {"loss": float(step)}, step)
    killed.send("evaluation", {"success": 0.5, "split": "id"}, 8)
    killed.close()
    # The log of that run: its checkpoint is of step 5, and it had a row of step 0 that TensorBoard's files lack.
    kept = [row("rollout", 0, env_steps=3), *(row("step", step, loss=float(step)) for step in range(1, 6))]
    kept += [row("evaluation", 8, success=0.5, split="id"), {"kind": "learner", "time": 1.0, "step": 5, "pid": 1}]
    time.sleep(1.1)  # TensorBoard orders its files by the second.
    resumed = Telemetry(tmp_path, "run")
    resumed.rewrite_after(-1, kept)
    for step in range(6, 10):
        resumed.send("train", {"loss": 100.0 * step}, step)
    resumed.close()
    again = [(step, 100.0 * step) for step in range(6, 10)]
    assert shown_curve(tmp_path) == [*((step, float(step)) for step in range(1, 6)), *again]
    assert shown_curve(tmp_path, "evaluation_id/success") == [(8, 0.5)]
    assert shown_curve(tmp_path, "rollout/env_steps") == [(0, 3.0)]


def test_steps_that_a_restarted_learner_does_again_are_shown_once(tmp_path):
    telemetry = Telemetry(tmp_path, "run")
    for step in range(1, 5):
        telemetry.send("train", {"loss": float(step)}, step)
    telemetry.send("evaluation", {"success": 0.25, "split": "id"}, 4)
    time.sleep(1.1)
    telemetry.rewrite_after(
        2, [row("evaluation", 0, success=0.0, split="id"), row("evaluation", 4, success=0.25, split="id")]
    )
    for step in range(3, 6):
        telemetry.send("train", {"loss": 10.0 * step}, step)
    telemetry.close()
    assert shown_curve(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert shown_curve(tmp_path, "evaluation_id/success") == [(4, 0.25)]


def test_a_session_that_begins_at_a_step_takes_the_place_of_what_was_there(tmp_path):
    for factor in (1.0, 10.0):
        telemetry = Telemetry(tmp_path, "run")
        for step in range(3 if factor > 1 else 1, 5):
            telemetry.send("train", {"loss": factor * step}, step)
        telemetry.close()
        time.sleep(1.1)
    assert shown_curve(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("try[lr=1e-3] a/b", "try[lr=1e-3] a/b"),
        ("läuf", "l%C3%A4uf"),
        ("100%", "100%25"),
        ("two\nlines", "two%0Alines"),
        ("\udcff", "%ED%B3%BF"),
    ],
)
def test_any_name_of_a_run_is_a_tag_that_ray_takes(tmp_path, name, tag):
    assert as_tag(name) == tag
    telemetry = Telemetry(tmp_path, name)
    telemetry.send("train", {"loss": 1.0}, 1)
    telemetry.repeat()
    telemetry.close()
