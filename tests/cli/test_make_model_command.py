"""`gflowvlm make-model`: what its options ask for, and what is said of wrong ones."""

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gflowvlm.cli.main import app
from gflowvlm.run.interruption import INTERRUPTED
from gflowvlm.run.preset_library import load_preset
from gflowvlm.shared.errors import UserError
from gflowvlm.warm_starts import language_models, made_model
from gflowvlm.warm_starts.made_model import MakeModelRequest


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["make-model", *arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[MakeModelRequest]:
    """What was asked for instead of being made."""
    requests: list[MakeModelRequest] = []

    def keep(request: MakeModelRequest, out: Path, console: object) -> bool:
        requests.append(request)
        return request.sft.sft.steps > 1

    monkeypatch.setattr(made_model, "make_model", keep)
    return requests


def test_options_and_settings_of_the_task_reach_the_request(tmp_path: Path, asked: list[MakeModelRequest]) -> None:
    options = ("--steps", "40", "--reading-steps", "7", "--seed", "3", "--no-ood", "--done-token")
    result = run("smollm2-135m", "prompt=markov", "--out", str(tmp_path), *options, "--vision", "blackjack-tiny")
    assert result.exit_code == 0, result.output
    (request,) = asked
    assert (request.language_model, request.vision) == ("smollm2-135m", "blackjack-tiny")
    assert (request.alignment.steps, request.alignment.seed) == (7, 3)
    assert (request.sft.task.prompt, request.sft.ood, request.sft.sft.steps) == ("markov", False, 40)
    assert not request.sft.sft.train_embeddings
    assert request.sft.done_token


def test_by_default_it_makes_what_the_preset_trains(tmp_path: Path, asked: list[MakeModelRequest]) -> None:
    assert run("smollm2-135m", "prompt=markov", "--out", str(tmp_path)).exit_code == 0
    preset = load_preset("numberline-smol")
    assert asked[0].sft.task == preset.task
    assert not asked[0].sft.done_token
    assert asked[0].sft.sft.dtype == preset.policy.dtype


def test_a_stopped_one_has_the_exit_status_of_an_interruption(tmp_path: Path, asked: list[MakeModelRequest]) -> None:
    assert run("smollm2-135m", "--out", str(tmp_path), "--steps", "1").exit_code == INTERRUPTED


@pytest.mark.parametrize(
    ("option", "value"),
    [("--noise", "1.5"), ("--lr", "-1"), ("--batch", "0"), ("--dtype", "int4"), ("--task", "x"), ("--pictures", "0")],
)
def test_a_value_out_of_bounds_is_a_user_error_that_names_it(tmp_path: Path, option: str, value: str) -> None:
    error = run("smollm2-135m", "--out", str(tmp_path / "made"), option, value).exception
    assert isinstance(error, UserError)
    assert option.lstrip("-") in str(error)
    assert not (tmp_path / "made").exists()


def test_a_missing_package_is_a_user_error_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_models, "find_spec", lambda name: None)
    error = run("smollm2-135m", "--out", str(tmp_path / "made")).exception
    assert isinstance(error, UserError)
    assert "pip install gguf" in str(error)
    assert not (tmp_path / "made").exists()


def test_another_language_model_is_a_user_error(tmp_path: Path) -> None:
    error = run("gpt-5", "--out", str(tmp_path / "made")).exception
    assert isinstance(error, UserError)
    assert "smollm2-135m" in str(error)
