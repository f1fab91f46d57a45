"""`gflowvlm check` on a terminal: its table, its file, its exit status."""

import json
import time

import pytest
from typer.testing import CliRunner

from gflowvlm.cli.commands.check import run_of
from gflowvlm.cli.main import app
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.errors import UserError
from tests.cli.test_errors import assert_one_line, gflowvlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_tiny_policy(tmp_path_factory.mktemp("model")))


def test_a_quick_check_shows_its_findings_at_80_columns_and_writes_them(model, tmp_path):
    found = tmp_path / "found.json"
    command = ["check", model, "--task", "blackjack", "--quick", "--json", str(found), "task.answer_format=tags"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.output.splitlines() if line.startswith("│")) <= 80
    assert "looking at the processor ..." in result.output
    train = f"gflowvlm train task.name=blackjack policy.model={model} task.answer_format=tags"
    assert f"{model} can be trained: {train}" in result.output.replace("\n", "")
    content = json.loads(found.read_text())
    assert content["trainable"] is True
    assert content["round_trip"] == 1.0
    assert content["action_mass_max"] is None
    assert content["task"] == "blackjack"
    assert [device["name"] for device in content["memory_plan"]["devices"]] == ["main memory"]


def test_a_model_that_cannot_be_trained_exits_with_1(model):
    result = CliRunner().invoke(app, ["check", model, "--quick", "policy.lora_targets=[none]"])
    assert result.exit_code == 1
    assert "cannot be trained like this: see the red line" in result.output


def test_a_gpu_that_is_not_here_is_planned_for(model):
    run = ["sampler.gpus_per_replica=0.5", "learner.gpus_per_worker=0.5"]
    result = CliRunner().invoke(app, ["check", model, *run, "--quick", "--gpu-memory", "2"])
    assert result.exit_code == 0
    assert "the GPU of sampler and learner: " in result.output


def test_a_shipped_model_is_checked_for_its_own_preset_and_another_task_for_the_defaults():
    assert run_of("blackjack-tiny", None, None, None, []).name == "blackjack-tiny"
    other = run_of("blackjack-tiny", "numbersequence", None, None, ["learner.steps=3"])
    assert (other.task.name, other.policy.model, other.learner.steps) == ("numbersequence", "blackjack-tiny", 3)
    with pytest.raises(UserError, match=r"learner\.stps"):
        run_of("blackjack-tiny", None, None, None, ["learner.stps=3"])


def test_a_run_that_cannot_train_is_refused_before_there_is_a_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = gflowvlm("train", f"policy.model={model}", "sampler.max_model_len=100", cwd=tmp_path)
    assert_one_line(short, "the longest prompt has", "sampler.max_model_len is 100; set sampler.max_model_len=")
    large = [f"policy.model={model}", "sampler.gpus_per_replica=0.5", "learner.gpus_per_worker=0.5"]
    small = CliRunner().invoke(app, ["train", *large, "--dry-run", "--gpu-memory", "1"])
    assert small.exit_code == 1
    assert "does not fit: the GPU of sampler and learner needs" in small.output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would_refuse(model, monkeypatch):
    bounded = CliRunner().invoke(app, ["train", f"policy.model={model}", "policy.min_pixels=9999", "--dry-run"])
    assert bounded.exit_code == 1
    assert "would not start: policy.min_pixels: the pictures of" in bounded.output
    monkeypatch.setattr("gflowvlm.learner.model.find_spec", lambda name: None)
    rounded = CliRunner().invoke(app, ["train", f"policy.model={model}", "policy.load_in=4bit", "--dry-run"])
    assert rounded.exit_code == 1
    assert "would not start: policy.load_in = 4bit: needs bitsandbytes" in rounded.output
    unread = CliRunner().invoke(app, ["train", "policy.model=some/model", "task.answer_format=no:Format", "--dry-run"])
    assert unread.exit_code != 0
    assert "task.answer_format = 'no:Format': there is no module 'no'" in str(unread.exception)


@pytest.mark.parametrize("few", ["8bit", "4bit"])
def test_a_run_with_fewer_bits_without_bitsandbytes_is_refused_by_the_check(model, monkeypatch, few):
    monkeypatch.setattr("gflowvlm.learner.model.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["check", model, "--quick", f"policy.load_in={few}"])
    assert result.exit_code == 1
    assert "bitsandbytes" in result.output


@pytest.mark.slow
def test_the_whole_check_starts_vllm_and_takes_about_a_minute(tmp_path):
    found = tmp_path / "found.json"
    started = time.monotonic()
    result = gflowvlm("check", "numberline-tiny", "--json", found, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - started < 90
    content = json.loads(found.read_text())
    assert content["action_mass_max"] <= 1.0 + 1e-5
    assert content["mismatch_max"] < 1e-4
    assert content["mismatch_max_adapter"] < 1e-4
