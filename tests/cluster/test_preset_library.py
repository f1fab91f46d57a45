import pytest

from cluster.models import shipped_models
from cluster.preset_library import DEFAULT_PRESET, PRESETS, load_preset, preset_names
from cluster.ray_runtime import resource_plan
from envs.registry import make_env
from shared.config_io import dump_config, load_config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_carries_its_own_name(name, tmp_path):
    config = load_preset(name)
    assert config.name == name
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_planned_and_its_model_is_shipped_or_the_users(name):
    config = load_preset(name)
    plan = resource_plan(config)
    assert plan.cpus > 0
    assert (plan.gpus > 0) == name.endswith("-7b")
    assert config.policy.model in ([f"models/{name}"] if name.endswith("-7b") else shipped_models())
    assert make_env(config.task).task == config.task.name


def test_the_default_preset_comes_first():
    assert preset_names()[0] == DEFAULT_PRESET
    assert len(preset_names()) == len(list(PRESETS.glob("*.yaml")))
