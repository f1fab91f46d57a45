"""Names and settings lead to the right environment."""

import pytest
from pydantic import ValidationError

from gflowvlm.envs.registry import TASKS, default_settings, make_env
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import parse_config
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import BlackjackSettings, NumberLineSettings


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_made_from_its_default_settings(task: str) -> None:
    settings = default_settings(task)
    assert settings.name == task
    env = make_env(settings)
    assert env.task == task
    assert env.settings == settings


@pytest.mark.parametrize("task", TASKS)
def test_a_configuration_of_every_task_survives_being_written_and_read(task: str) -> None:
    config = RunConfig(task=default_settings(task))
    assert RunConfig.model_validate(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_that_names_no_task_is_numberlines() -> None:
    config = RunConfig.model_validate({"task": {"n_max": 7}})
    assert config.task == NumberLineSettings(n_max=7)
    assert RunConfig.model_validate({"task": {"name": "blackjack"}}).task == BlackjackSettings()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"n_max": 0}, r"task\.n_max = 0"),
        ({"name": "blackjack", "n_max": 3}, r"unknown key 'task\.n_max'"),
        ({"name": "numbersequence", "choices": 1}, r"task\.choices = 1"),
        ({"name": "chess"}, r"chess.*numberline.*blackjack.*numbersequence"),
        ({"name": ["blackjack"]}, "task"),
        (3, "task = 3"),
    ],
)
def test_wrong_task_settings_are_named_by_their_key(task: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"task": task}, "file")


def test_settings_of_a_task_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        default_settings("blackjack").max_steps = 3
