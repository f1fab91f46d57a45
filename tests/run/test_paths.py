"""Paths of a configuration: absolute from the start, wherever the processes of a run stand."""

import os
import re
from pathlib import Path

import pytest

from gflowvlm.run.models import resolve_model, shipped_models
from gflowvlm.run.paths import check_absolute, check_paths, configured_paths, with_absolute_paths
from gflowvlm.run.preset_library import named_config, preset_names, resolve_config
from gflowvlm.run.setup import new_run, open_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs, directory_or_hub_name
from gflowvlm.warm_starts.supervised import TINY, SftRequest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user stands in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_every_path_of_a_configuration_is_one_of_the_folder_the_user_stands_in(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "models" / "warm").mkdir(parents=True)
    paths = ["policy.model=models/warm", "rollout.demonstrations=~/sets/a", "task.games=../games"]
    config = resolve_config(None, None, ["task.name=alfworld", *paths])
    assert config.policy.model == str(here / "models" / "warm")
    assert config.rollout.demonstrations == str(here / "home" / "sets" / "a")
    assert config.task.model_dump()["games"] == str(here.parent / "games")
    assert with_absolute_paths(config) == config
    assert RunConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("model", "is_path"),
    [
        ("./warm", True),
        ("../warm", True),
        ("~/warm", True),
        ("/data/warm", True),
        ("models/warm/", True),
        ("a/b/c", True),
        ("my models", True),
        (".", True),
        ("owner/name", False),
        ("name", False),
        ("owner/name-1.6_b", False),
    ],
)
def test_a_model_is_a_path_or_a_name(here: Path, model: str, is_path: bool) -> None:
    config = RunConfig.model_validate({"policy": {"model": model}})
    assert [path.key for path in configured_paths(config)] == (["policy.model"] if is_path else [])
    resolved = with_absolute_paths(config).policy.model
    assert resolved == (os.path.abspath(Path(model).expanduser()) if is_path else model)


def test_a_shipped_models_name_is_never_a_folder_here(here: Path) -> None:
    for name in shipped_models():
        (here / name).mkdir()
        config = with_absolute_paths(RunConfig.model_validate({"policy": {"model": name}}))
        assert Path(resolve_model(config.policy.model)).parent.name == "pretrained"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "policy.model=./warm",
            r"policy\.model = '.*/here/warm': no such directory; give a model directory",
        ),
        (
            "rollout.demonstrations=sets",
            r"rollout\.demonstrations = '.*/here/sets': no such directory; `gflowvlm demo",
        ),
        ("task.games=games", r"task\.games = '.*/here/games': no such directory"),
    ],
)
def test_a_folder_that_is_missing_is_one_line_that_names_its_key(here: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_paths(resolve_config(None, None, ["task.name=alfworld", override]))
    assert "\n" not in str(error.value)


def test_a_run_keeps_absolute_paths_and_is_not_made_with_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "warm").mkdir()
    folder = new_run(resolve_config(None, None, ["policy.model=warm"]), here / "run")
    (here / "elsewhere" / "warm").mkdir(parents=True)
    monkeypatch.chdir(here / "elsewhere")
    assert open_run(folder.root)[1].policy.model == str(here / "warm")
    relative = named_config(None, None, ["policy.model=./warm"])
    with pytest.raises(UserError, match=r"policy\.model = '\./warm': is relative"):
        new_run(relative, here / "other")
    assert not (here / "other").exists()
    with pytest.raises(UserError, match="is relative"):
        check_absolute(relative)


def test_a_model_is_never_loaded_from_the_folder_that_a_process_happens_to_stand_in(here: Path) -> None:
    (here / "owner" / "name").mkdir(parents=True)
    for model in ("owner/name", "./owner/name", "~/name"):
        with pytest.raises(UserError, match="write the absolute path"):
            PolicyInputs.load(model)
    assert directory_or_hub_name("owner/another") == "owner/another"
    assert directory_or_hub_name(str(here / "owner")) == str(here / "owner")


def test_presets_name_models_that_ship_folders_or_hub_names(here: Path) -> None:
    for name in preset_names():
        model = named_config(name, None).policy.model
        assert model in shipped_models() or model.startswith("./models/") or re.fullmatch(r"Qwen/[\w.-]+", model)


def test_a_new_tiny_policy_is_no_folder(here: Path) -> None:
    (here / TINY).mkdir()
    request = with_absolute_paths(SftRequest(), names=(TINY,))
    assert request.model == TINY
    assert with_absolute_paths(SftRequest(model="./x")).model == str(here / "x")
