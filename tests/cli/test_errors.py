"""Bad input is one line on stderr and exit status 2, and leaves nothing behind."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig

ROOT = Path(__file__).parents[2]


def gflowvlm(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "gflowvlm.cli.main", *map(str, arguments)],
        cwd=cwd,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line(result, *parts):
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("gflowvlm:")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--preset", "numberline-tny"], ["numberline-tny", "did you mean 'numberline-tiny'"]),
        (["train", "learner.stps=3"], ["gflowvlm: unknown key 'learner.stps'", "did you mean 'learner.steps'"]),
        (["train", "learner.steps=0"], ["learner.steps = 0", "greater than or equal to 1"]),
        (["train", "--config", "none.yaml"], ["none.yaml"]),
        (["train", "--resume", "none"], ["none", "no run there"]),
        (["train", "policy.model=./none"], ["policy.model = ", "/none': no such directory"]),
        (["compare", "--losses", "var_tb,var_tb"], ["--losses", "once"]),
        (["compare", "--losses", "ppoo"], ["objective.loss = 'ppoo'"]),
        (["compare", "objective.loss=db"], ["objective.loss=db", "--losses"]),
        (["experiment", "motivating", "seed=7", "--dry-run"], ["seed=7", "--seeds"]),
        (["experiment"], ["--list"]),
        (["experiment", "motivate"], ["did you mean 'motivating'"]),
        (["experiment", "[/x]"], ["[/x]"]),
        (["experiment", "cot-weight", "--scale", "large"], ["--scale", "tiny or paper"]),
        (["experiment", "cot-weight", "learner.stps=3", "--dry-run"], ["did you mean 'learner.steps'"]),
        (["eval", "none"], ["none", "no run there"]),
        (["replay", "none"], ["none"]),
        (["scale", "none", "rollout.workers=4"], ["none", "no folder of a run here"]),
        (["scale", "none", "workers=4"], ["'workers=4'", "did you mean rollout.workers=4?"]),
        (["alfworld", "games", "[none]"], ["[none]", "gflowvlm alfworld generate"]),
        (["play", "chess"], ["chess"]),
        (["play", "numberline", "--player", "nobody"], ["nobody"]),
        (["train", "--dry-run", "task.answer_format=tag"], ["task.answer_format", "'tag'", "json, tags"]),
    ],
)
def test_wrong_arguments_are_one_line(arguments, parts, tmp_path):
    assert_one_line(gflowvlm(*arguments, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_format_that_cannot_be_imported_is_one_line(tmp_path):
    result = gflowvlm("train", "--run", "r", "task.answer_format=nowhere_at_all:Format", cwd=tmp_path)
    assert_one_line(result, "task.answer_format", "nowhere_at_all.py")


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = gflowvlm("train", "--run", "r", f"cluster.dashboard_port={port}", cwd=tmp_path)
    assert_one_line(result, f"cluster.dashboard_port = {port}", "in use")


@pytest.mark.slow
def test_gpus_that_are_not_there_are_one_line(tmp_path):
    result = gflowvlm("train", "--run", "r", "learner.gpus_per_worker=1", cwd=tmp_path)
    if "GPU" not in result.stderr and result.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert_one_line(result, "asks for 1 GPUs", "numberline-tiny")


def test_a_run_is_not_started_over_another(tmp_path):
    new_run(RunConfig(), tmp_path / "r")
    assert_one_line(gflowvlm("train", "--run", "r", cwd=tmp_path), "holds a run already", "--resume")


def test_a_corrupted_checkpoint_is_named(tmp_path):
    folder = new_run(RunConfig(), tmp_path / "r")
    checkpoint = folder.checkpoints / "step-00000003"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text('{"format": 1')
    assert_one_line(gflowvlm("train", "--resume", "r", cwd=tmp_path), "step-00000003", "corrupted checkpoint")


def test_the_7b_preset_resolves_and_plans(tmp_path):
    result = gflowvlm("train", "--preset", "numberline-7b", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0
    assert "4 GPUs" in result.stdout
    assert list(tmp_path.iterdir()) == []
