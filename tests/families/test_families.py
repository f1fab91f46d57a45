"""Every family, in transformers alone: what is played is what is scored, adapters, gradients, supervised steps."""

import asyncio

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from gflowvlm.actors.samplers import make_sampler
from gflowvlm.learner.model import adapter_parameters
from gflowvlm.learner.sft import SftExample, SftSettings, load_for_sft
from gflowvlm.learner.sft_trainer import SftTrainer
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.prompt_settings import PromptSettings
from gflowvlm.warm_starts.warm_start import generate
from tests.families.agreement import SIZES, difference, lively_policy, picture, requests, sampling
from tests.families.factory import FAMILIES

TOLERANCE = 1e-4
ANSWER = '{"current": 3, "target": 5, "thoughts": "3 is below 5", "action": "+"}'

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def config() -> RunConfig:
    return sampling("transformers")


@every_family
def test_what_is_played_is_what_is_scored_with_and_without_an_adapter(name, family_folder, config, tmp_path):
    folder = family_folder(name)
    policy, inputs = lively_policy(config, folder), PolicyInputs.load(str(folder))
    policy.save_pretrained(tmp_path)
    sampler = make_sampler(config, str(folder), "transformers")

    async def both() -> list[float]:
        await sampler.load(1, tmp_path)
        return [await difference(sampler, policy, inputs, version) for version in (0, 1)]

    try:
        assert max(asyncio.run(both())) <= TOLERANCE
    finally:
        sampler.shutdown()


@every_family
def test_a_saved_adapter_is_the_same_policy_in_plain_peft(name, family_folder, config, tmp_path):
    folder = family_folder(name)
    policy, inputs = lively_policy(config, folder), PolicyInputs.load(str(folder))
    policy.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path).eval()
    encoded = inputs.encode(["What now?"], [picture(0, SIZES[0])])
    with torch.no_grad():
        torch.testing.assert_close(plain(**encoded).logits, policy(**encoded).logits, atol=1e-5, rtol=1e-5)
        with plain.disable_adapter():
            assert not torch.allclose(plain(**encoded).logits, policy(**encoded).logits, atol=1e-2)


@every_family
def test_all_linear_layers_of_the_language_model_and_no_others_get_an_adapter(name, family_folder, config):
    policy = lively_policy(config, family_folder(name))
    adapted = {key.partition(".lora_")[0].rpartition(".")[2] for key, _ in adapter_parameters(policy)}
    mlp = {"gate_up_proj", "down_proj"} if name == "glm4v" else {"gate_proj", "up_proj", "down_proj"}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"} | mlp
    assert not any("vision" in key or "visual" in key for key, _ in adapter_parameters(policy))


@every_family
def test_pictures_change_what_is_said(name, family_folder):
    folder = family_folder(name)
    inputs = PolicyInputs.load(str(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        first, second = (model(**inputs.encode([""], [picture(seed, SIZES[0])])).logits[0, -1] for seed in (0, 1))
    assert float((first - second).abs().max()) > 0.1


@every_family
def test_supervised_steps_lower_the_loss_and_the_saved_model_loads_again(name, family_folder, tmp_path):
    settings = SftSettings(steps=6, batch_size=4, micro_batch=4, warmup_steps=0, learning_rate=3e-3)
    network, inputs = load_for_sft(str(family_folder(name)), settings)
    trainer = SftTrainer(network, inputs, settings)
    examples = [SftExample(asked.prompt, asked.image, ANSWER) for asked in requests(0)[:4]]
    losses = []

    class Source:
        def batch(self, step: int, size: int) -> list[SftExample]:
            return examples

    trainer.train(Source(), tmp_path / "checkpoint", lambda progress: losses.append(progress.loss), lambda: False)
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(tmp_path / "model")
    # Under the names that the model came with: who serves it knows no others.
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for (key, one), (other_key, other) in zip(loaded.named_parameters(), network.named_parameters(), strict=True):
        assert key == other_key
        assert torch.equal(one, other)
    assert saved_names(tmp_path / "model") == saved_names(family_folder(name))
    assert PolicyInputs.load(str(tmp_path / "model")).encode_response(ANSWER) == inputs.encode_response(ANSWER)


def saved_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_the_closing_figures_of_sft_are_the_models_own_and_its_generation_settings_stay(family_folder):
    settings = SftSettings(steps=1)
    network, inputs = load_for_sft(str(family_folder("qwen2_5_vl")), settings)
    network.eval()
    asked = requests(0)[0]

    def answer() -> list[str]:
        return generate(network, inputs, [asked.prompt], [asked.image], temperature=0.0, max_tokens=24)

    penalised = network.generation_config
    penalised.repetition_penalty = 50.0
    found = answer()
    assert network.generation_config is penalised
    penalised.repetition_penalty = 1.0
    assert found == answer()


def test_prompts_of_sft_are_those_of_the_run_that_follows(family_folder):
    said = {"system_prompt": "Be brief.", "max_pixels": 4 * 28 * 28}
    folder = str(family_folder("qwen2_5_vl"))
    _, taught = load_for_sft(folder, SftSettings(steps=1, **said))
    played = PolicyInputs.load(folder, prompts=PromptSettings(**said))
    shown = picture(0, (224, 224))
    ids = [inputs.encode(["What now?"], [shown])["input_ids"][0].tolist() for inputs in (taught, played)]
    assert ids[0] == ids[1]
    assert "Be brief." in taught.tokenizer.decode(ids[0])
