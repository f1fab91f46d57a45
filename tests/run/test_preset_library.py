from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gflowvlm.cluster.launch.ray_runtime import resource_plan
from gflowvlm.envs.household.generation import generate, specs
from gflowvlm.envs.registry import make_env
from gflowvlm.run.models import resolve_model, shipped_models
from gflowvlm.run.preset_library import DEFAULT_PRESET, PRESETS, load_preset, preset_names
from gflowvlm.shared.config_io import dump_config, load_config
from gflowvlm.shared.policy_inputs import PolicyInputs


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
    of_hub = name.startswith("qwen")
    assert (plan.gpus > 0) == (of_hub or name.endswith("-7b"))
    made = name.endswith(("-7b", "-smol"))
    assert of_hub or config.policy.model in ([f"./models/{name}"] if made else shipped_models())
    assert make_env(config.task).task == config.task.name


def test_the_default_preset_comes_first():
    assert preset_names()[0] == DEFAULT_PRESET
    assert len(preset_names()) == len(list(PRESETS.glob("*.yaml")))


@pytest.mark.skipif(find_spec("alfworld") is None, reason="make alfworld")
def test_alfworld_tiny_knows_every_word_of_its_games_and_they_fit(tmp_path: Path) -> None:
    config = load_preset("alfworld-tiny")
    list(generate(tmp_path, specs({"train": 6}, "small", 11), workers=1))
    env = make_env(config.task.model_copy(update={"games": str(tmp_path)}))
    inputs = PolicyInputs.load(resolve_model(config.policy.model))
    rng = np.random.default_rng(0)
    for seed in range(6):
        env.reset(seed=seed)
        while env.end is None:
            prompt = inputs.render(env.prompt())
            ids = inputs.tokenizer.encode(prompt, add_special_tokens=False)
            assert inputs.tokenizer.decode(ids) == prompt
            # A single letter is a word that fell apart.
            assert [piece for i in ids if len(piece := inputs.tokenizer.decode([i])) == 1 and piece.isalpha()] == []
            text = env.demonstration(env.expert_action(), rng)
            response = inputs.encode_response(text)
            read = inputs.read(response)
            assert read.parsed.action == env.expert_action()
            assert read.layout.stop_ids[-1] == inputs.done_id
            assert len(response) <= config.policy.max_response_tokens
            tokens = inputs.encode([env.prompt()], [env.image_png()])["input_ids"].shape[1]
            assert tokens + config.policy.max_response_tokens < config.sampler.max_model_len / 2
            env.step(env.expert_action())
