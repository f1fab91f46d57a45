"""`gflowvlm sft` end to end on a few steps: the folder it writes, stopping, resuming, refusals."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from gflowvlm.cli.commands import sft
from gflowvlm.envs.household.generation import generate, specs
from gflowvlm.learner.sft import SftExample
from gflowvlm.run.folder_lock import folder_lock
from gflowvlm.run.models import resolve_model, shipped_models
from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.warm_starts import supervised
from tests.actors.made_demonstrations import damage, files, make_set, truncate

ROOT = Path(__file__).resolve().parents[2]
QUIET = ("--episodes", "0", "--checkpoint-every", "100")
PROGRAM = "import typer; from gflowvlm.cli.commands import sft; app = typer.Typer(); sft.register(app); app()"


def run(*arguments: str) -> Result:
    app = typer.Typer()
    sft.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_it_writes_a_model_with_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "made"
    options = ("--out", str(out), "--steps", "4", "--batch", "4", "--episodes", "2", "--checkpoint-every", "2")
    result = run("prompt=markov", "n_max=4", *options)
    assert result.exit_code == 0, result.output
    assert PolicyInputs.load(str(out)).done_id is not None
    report = json.loads((out / "training.json").read_text())
    assert report["request"]["noise"] == 0.5
    assert report["request"]["sft"]["steps"] == 4
    assert report["request"]["task"]["prompt"] == "markov"
    assert report["request"]["task"]["n_max"] == 4
    assert [(f["split"], f["temperature"]) for f in report["figures"]] == [
        ("id", 1.0), ("id", 0.0), ("ood", 1.0), ("ood", 0.0),
    ]  # fmt: skip
    assert report["figures"][0]["malformed"] == 1.0
    assert report["wall_seconds"] > 0
    assert not (out / "checkpoint").exists()
    again = run("--out", str(out), "--steps", "4")
    assert isinstance(again.exception, UserError)


def test_games_that_the_final_figures_want_are_missed_before_the_training(tmp_path: Path) -> None:
    if find_spec("alfworld") is None:
        pytest.skip("alfworld is not installed: make alfworld")
    games, out = tmp_path / "games", tmp_path / "made"
    list(generate(games, specs({"train": 1}, "small", seed=0), workers=1))
    arguments = ("--task", "alfworld", f"games={games}", "prompt=markov", "--no-ood", "--out", str(out), "--steps", "1")
    refused = run(*arguments, "--batch", "2")
    assert isinstance(refused.exception, UserError)
    assert "valid_unseen: no game" in str(refused.exception)
    assert not out.exists()
    assert run(*arguments, "--batch", "2", "--episodes", "0").exit_code == 0


@pytest.mark.slow
def test_ctrl_c_leaves_a_training_that_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "made"
    options = ["--out", str(out), "--steps", "60", "--batch", "2", "--episodes", "0", "--checkpoint-every", "5"]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *options], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint" / "state.json").exists():
            assert time.monotonic() < deadline, "no checkpoint was written within 120 s"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    stopped_at = json.loads((out / "checkpoint" / "state.json").read_text())["step"]
    assert 5 <= stopped_at < 60
    result = run("--resume", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors").exists()


def test_resuming_nothing_is_a_user_error(tmp_path: Path) -> None:
    assert isinstance(run("--resume", "--out", str(tmp_path)).exception, UserError)


@pytest.mark.parametrize(
    ("option", "value"), [("--noise", "1.5"), ("--lr", "-1"), ("--steps", "0"), ("--dtype", "int4"), ("--task", "x")]
)
def test_a_value_out_of_bounds_is_a_user_error_that_names_it(tmp_path: Path, option: str, value: str) -> None:
    error = run("--out", str(tmp_path / "made"), option, value).exception
    assert isinstance(error, UserError)
    assert option.lstrip("-") in str(error)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("setting", ["n_max=0", "no_such=1", "prompt=short"])
def test_a_wrong_setting_of_the_task_is_a_user_error_that_names_it(tmp_path: Path, setting: str) -> None:
    error = run("--out", str(tmp_path / "made"), setting).exception
    assert isinstance(error, UserError)
    assert setting.partition("=")[0] in str(error)
    assert not (tmp_path / "made").exists()


def test_a_missing_model_is_a_user_error(tmp_path: Path) -> None:
    error = run("--out", str(tmp_path / "made"), "--model", str(tmp_path / "none")).exception
    assert isinstance(error, UserError)
    assert not (tmp_path / "made" / "training.json").exists()


def test_the_final_figures_are_of_responses_as_long_as_a_training_lets_them_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def generate(*arguments: Any) -> list[str]:
        lengths.append(arguments[-1])
        return ["malformed"] * len(arguments[2])

    monkeypatch.setattr("gflowvlm.warm_starts.warm_start.generate", generate)
    options = ("--steps", "1", "--batch", "2", "--episodes", "1")
    for name, more, expected in (("a", (), PolicySettings().max_response_tokens), ("b", (300,), 300)):
        lengths.clear()
        result = run("--out", str(tmp_path / name), *options, *("--max-response-tokens", *map(str, more)) * len(more))
        assert result.exit_code == 0, result.output
        assert set(lengths) == {expected}


def test_embeddings_are_trained_where_those_of_the_model_were_or_where_asked_for(tmp_path: Path) -> None:
    options = ("--steps", "1", "--batch", "2", *QUIET)
    hub = shutil.copytree(resolve_model("numberline-tiny"), tmp_path / "hub", ignore=lambda *_: ["training.json"])
    trained = {}
    for out, more in (
        ("new", ()),
        ("again", ("--model", str(tmp_path / "new"))),
        ("of-hub", ("--model", str(hub))),
        ("asked", ("--model", str(hub), "--train-embeddings")),
    ):
        result = run("--out", str(tmp_path / out), *options, *more)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / out / "training.json").read_text())
        trained[out] = report["request"]["sft"]["train_embeddings"]
    assert trained == {"new": True, "again": True, "of-hub": False, "asked": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--lora-rank: all weights of a new model are random"),
        (("--model", "numberline-tiny", "--head-scale", "2"), "--head-scale: not with --lora-rank"),
        (("--model", "numberline-tiny", "--train-embeddings"), "--train-embeddings: not with --lora-rank"),
    ],
)
def test_what_contradicts_an_adapter_is_a_user_error(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run("--out", str(tmp_path / "made"), "--steps", "1", "--lora-rank", "4", *options, *QUIET)
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(message)


def test_an_adapter_is_merged_into_the_model_that_is_made(tmp_path: Path) -> None:
    options = ("--model", "numberline-tiny", "--lora-rank", "4", "--dtype", "bfloat16", "--episodes", "1")
    result = run("--out", str(tmp_path / "made"), "--steps", "2", "--batch", "2", *options)
    assert result.exit_code == 0, result.output
    request = json.loads((tmp_path / "made" / "training.json").read_text())["request"]["sft"]
    assert (request["lora_rank"], request["learning_rate"], request["train_embeddings"]) == (4, 2e-4, False)
    assert not (tmp_path / "made" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shipped_models_resolve_to_loadable_directories() -> None:
    assert "numberline-tiny" in shipped_models()
    assert PolicyInputs.load(resolve_model("numberline-tiny")).done_id is not None
    assert resolve_model("some/hub-name") == "some/hub-name"


# From a set of demonstrations


def test_it_learns_from_a_set_and_says_so(tmp_path: Path) -> None:
    made, out = make_set(tmp_path / "set", "blackjack", noise=0.25), tmp_path / "made"
    result = run("--demonstrations", str(made.folder), "--out", str(out), "--steps", "2", "--batch", "4", *QUIET)
    assert result.exit_code == 0, result.output
    request = json.loads((out / "training.json").read_text())["request"]
    assert request["task"] == made.request.task.model_dump(mode="json")
    assert (request["demonstrations"], request["noise"], request["ood"]) == (str(made.folder), 0.25, False)


def test_a_set_is_learned_from_and_nothing_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, shown = make_set(tmp_path / "set"), []

    def keep(network: object, inputs: object, examples: list[SftExample], *_: object) -> torch.Tensor:
        shown.extend(examples)
        return torch.ones(2, requires_grad=True)

    monkeypatch.setattr("gflowvlm.learner.sft_trainer.sft_loss", keep)
    responses = {step.response_text for t in made.trajectories() for step in t.steps}
    options = ("--demonstrations", str(made.folder), "--out", str(tmp_path / "made"), "--steps", "3")
    assert run(*options, "--batch", str(made.figures.responses), *QUIET).exit_code == 0
    assert len(shown) == 3 * made.figures.responses
    assert {example.response for example in shown} == responses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "0.1"], "--noise: for demonstrations made on the spot"),
        (["--no-ood"], "--ood: for demonstrations"),
        (["--reading-steps", "3"], "--reading-steps: for demonstrations"),
        (["--image-size", "128"], "--image-size: for demonstrations"),
        (["prompt=markov"], "settings of the task: for demonstrations"),
        (["--task", "blackjack"], "--task blackjack: the demonstrations in .* are of numberline"),
    ],
)
def test_what_contradicts_the_set_is_a_user_error(options: list[str], message: str, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", trajectories=1).folder
    error = run(*options, "--demonstrations", str(folder), "--out", str(tmp_path / "made")).exception
    assert isinstance(error, UserError)
    assert re.search(message, str(error))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("spoil", [truncate, damage, Path.unlink])
def test_a_damaged_set_is_a_user_error_before_anything_is_made(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set").folder
    spoil(files(folder)[0])
    error = run("--demonstrations", str(folder), "--out", str(tmp_path / "made")).exception
    assert isinstance(error, UserError)
    assert str(folder) in str(error)
    assert not (tmp_path / "made").exists()


def test_a_folder_with_a_model_that_it_did_not_make_is_left_alone(tmp_path: Path) -> None:
    shutil.copytree(resolve_model("numberline-tiny"), tmp_path / "model")
    (tmp_path / "model" / "training.json").unlink()
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    refused = run("--model", str(tmp_path / "model"), "--out", str(tmp_path / "model"), "--steps", "1")
    assert isinstance(refused.exception, UserError)
    assert "holds a model" in str(refused.exception)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_repeated_steps_that_would_teach_reading_alone_are_refused(tmp_path: Path) -> None:
    refused = run("--out", str(tmp_path / "made"), "--fresh-steps", "500", "--steps", "2000")
    assert isinstance(refused.exception, UserError)
    assert "--fresh-steps 500" in str(refused.exception)
    assert not (tmp_path / "made").exists()


def test_a_training_that_is_running_is_left_alone(tmp_path: Path) -> None:
    with folder_lock(tmp_path, UserError("held")):
        refused = run("--out", str(tmp_path), "--steps", "1", "--batch", "2", "--episodes", "0")
    assert isinstance(refused.exception, UserError)
    assert "another `gflowvlm sft`" in str(refused.exception)
    assert not (tmp_path / "training.json").exists()


def test_a_training_that_died_before_its_first_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"request": {}, "wall_seconds": 7}))
    result = run("--out", str(tmp_path), "--steps", "1", "--batch", "2", "--episodes", "0")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "training.json").read_text())["final_loss"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_stopped_while_it_plays_at_the_end_plays_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(*arguments: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("not interrupted")

    options = ("--out", str(tmp_path), "--steps", "2", "--batch", "2", "--episodes", "1")
    with monkeypatch.context() as patched:
        patched.setattr(supervised, "play_and_measure", play)
        stopped = run(*options)
    assert stopped.exit_code == 130
    assert "Stopped at step 2" in stopped.output
    assert not (tmp_path / "config.json").exists()
    result = run("--resume", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["final_loss"] > 0
    assert len(report["figures"]) == 4
