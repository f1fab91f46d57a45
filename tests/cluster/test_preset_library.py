import pytest

from cluster.preset_library import DEFAULT_PRESET, PRESETS, load_preset, preset_names
from shared.config_io import dump_config, load_config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_carries_its_own_name(name, tmp_path):
    config = load_preset(name)
    assert config.name == name
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_the_default_preset_comes_first():
    assert preset_names()[0] == DEFAULT_PRESET
    assert len(preset_names()) == len(list(PRESETS.glob("*.yaml")))
