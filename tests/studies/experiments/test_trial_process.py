"""A trial's commands, one after another, and what is said of one that failed."""

import pytest

from gflowvlm.studies.experiments.trial_process import TrialFailedError, TrialJob, last_log_lines, run_job
from gflowvlm.studies.experiments.trials import Command


def test_a_trial_does_what_is_left_and_nothing_once_it_is_to_stop(tmp_path, monkeypatch):
    asked = []

    def run_command(arguments, *, stop, log, directory, environment):
        asked.append(arguments)
        log.write_text("working\n\ngflowvlm: no space\n")
        (tmp_path / "a.partial").write_text("{}")
        return 2 if arguments == ("b",) else 0

    monkeypatch.setattr("gflowvlm.studies.experiments.trial_process.run_command", run_command)
    done = Command(("done",), tmp_path / "done", tmp_path / "done")
    done.result.touch()
    good = Command(("a",), tmp_path / "a", tmp_path / "a.partial")
    bad = Command(("b",), tmp_path / "b", tmp_path / "b")
    job = TrialJob((done, good, bad), tmp_path / "log", tmp_path / "stop", str(tmp_path), frozenset({"PATH"}))
    with pytest.raises(TrialFailedError, match=r"`b` ended \(status 2\): gflowvlm: no space"):
        run_job(job)
    assert asked == [("a",), ("b",)]
    assert good.result.exists()
    job.stop.touch()
    run_job(job)
    assert len(asked) == 2


def test_the_last_words_of_a_log_are_those_that_say_something(tmp_path):
    assert last_log_lines(tmp_path / "none") == "it said nothing"
    log = tmp_path / "log"
    log.write_text("x" * 10_000 + "\nlast\n  \nx.py:1: UserWarning: leaked objects\n  warnings.warn('leaked %d')\n")
    assert last_log_lines(log) == "last"
