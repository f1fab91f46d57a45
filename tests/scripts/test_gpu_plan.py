"""The presets of one GPU, by the memory plan of the models that they name."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_plan  # noqa: E402

from gflowvlm.run.preset_library import load_preset, preset_names  # noqa: E402


def test_every_preset_of_one_gpu_is_planned():
    assert {name for name in preset_names() if name.startswith("qwen")} == set(gpu_plan.PRESETS)


@pytest.mark.slow
@pytest.mark.parametrize("preset", gpu_plan.PRESETS)
def test_a_preset_fits_the_gpu_that_it_is_for_and_not_a_smaller_one(preset):
    model, size = gpu_plan.PRESETS[preset]
    plan = gpu_plan.preset_plan(preset)
    assert plan.problems == ()
    assert plan.remarks == ()
    assert load_preset(preset).policy.model.endswith(f"{model}-Instruct")
    # Nothing of it is left unused either.
    assert plan.needed > 0.7 * gpu_plan.SHOWN_AS[size] * 2**30


def test_the_models_have_the_sizes_that_they_are_published_with():
    text = gpu_plan.MODELS["Qwen2.5-VL-7B"].config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (3584, 28, 152_064)
