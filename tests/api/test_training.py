"""`gflowvlm.load_config` and `gflowvlm.train`: what they take, and what becomes of a training that is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import gflowvlm
from gflowvlm.run.setup import new_run, run_lock
from gflowvlm.shared.config_io import dump_config
from gflowvlm.shared.errors import UserError

ROOT = Path(__file__).parents[2]


def test_a_configuration_comes_from_whatever_names_one(tmp_path: Path, finished_run: Path) -> None:
    default = gflowvlm.load_config()
    assert default.name == "numberline-tiny"
    assert gflowvlm.load_config(default) == gflowvlm.load_config("numberline-tiny") == default
    assert gflowvlm.load_config(default.model_dump()) == default
    file = tmp_path / "mine.yaml"
    file.write_text(dump_config(default))
    assert gflowvlm.load_config(file) == gflowvlm.load_config(str(file)) == default
    assert gflowvlm.load_config(finished_run) == gflowvlm.Run(finished_run).config
    assert gflowvlm.load_config({}) == gflowvlm.RunConfig()


def test_overrides_are_a_mapping_or_as_on_the_command_line(tmp_path: Path) -> None:
    changed = gflowvlm.load_config(overrides={"learner.steps": 7, "objective.loss": "subtb", "policy.model": tmp_path})
    assert (changed.learner.steps, changed.objective.loss, changed.policy.model) == (7, "subtb", str(tmp_path))
    assert gflowvlm.load_config(overrides=["learner.steps=7"]).learner.steps == 7
    assert gflowvlm.load_config(overrides="learner.steps=7").learner.steps == 7
    whole = gflowvlm.load_config(overrides={"sampler": {"temperature": 0.5}})
    assert whole.sampler.temperature == 0.5


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("numberline-tinny", (), "no such preset; did you mean 'numberline-tiny'"),
        (Path("no/such.yaml"), (), "no/such.yaml: cannot be read"),
        ("no/such.yaml", (), "no/such.yaml: cannot be read"),
        ("numberline-tiny", {"learner.stepz": 1}, "^unknown key 'learner.stepz'; did you mean 'learner.steps'"),
        ("numberline-tiny", {"learner.steps": 0}, "^learner.steps = 0"),
        ("numberline-tiny", {"learner": {"steps": 0}}, "^learner.steps = 0"),
        ("numberline-tiny", "learner.steps=0", "^learner.steps = 0"),
        ("numberline-tiny", {"rollout.group_size": 1}, "^preset 'numberline-tiny': .*var_tb needs"),
        ({"learner": {"steps": 0}}, {"seed": 3}, "^configuration: learner.steps = 0"),
        ("numberline-tiny", {"name.first": "x"}, "setting 'name.first': 'name' is a value, not a section"),
        ({"learner": {"steps": "many"}}, (), "configuration: learner.steps = 'many'"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_line(source: object, overrides: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        gflowvlm.load_config(source, overrides)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_training_that_cannot_be_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        gflowvlm.train(overrides={"policy.model": tmp_path / "missing"}, run=tmp_path / "run")
    with pytest.raises(UserError, match=r"learner\.steps = 0"):
        gflowvlm.train(overrides={"learner.steps": 0}, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_trained_into(finished_run: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        gflowvlm.train(run=finished_run)


@pytest.mark.slow
def test_what_the_training_process_refuses_is_raised_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = new_run(gflowvlm.load_config(), tmp_path / "run")
    with run_lock(folder), pytest.raises(UserError, match=r"another .*is running this run"):
        gflowvlm.Run(folder.root).resume()
    assert "run folder: " in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_training_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    """As a notebook's stop button does it: SIGINT to the one process, between two lines of progress."""
    settings = {"sampler.engine": "transformers", "cluster.dashboard": False, "evaluation.at_start": False}
    # A status of its own for it: which Python takes for an exception that nobody catches depends on its exit handlers.
    code = (
        "import sys, traceback, gflowvlm\n"
        f"try: gflowvlm.train(overrides={settings!r}, run='run')\n"
        "except KeyboardInterrupt: traceback.print_exc(); sys.exit(130)\n"
    )
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GFLOWVLM_TEST_RUN": str(log)}
    with log.open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-u", "-c", code], cwd=tmp_path, env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 300
        while b"policy server is up" not in log.read_bytes():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        started.send_signal(signal.SIGINT)
        status = started.wait(timeout=120)
    finally:
        started.kill()
    said = log.read_text()
    assert status == 130, said
    assert f"interrupted; go on with: gflowvlm.Run({str(tmp_path / 'run')!r}).resume()" in said
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert not gflowvlm.Run(tmp_path / "run").finished
    deadline = time.monotonic() + 60
    while left := marked(log):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def marked(log: Path) -> list[str]:
    """Command lines of the processes that carry the log's path in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GFLOWVLM_TEST_RUN") == str(log) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
