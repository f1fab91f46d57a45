"""Prompts as the families' models were trained to be asked."""

import pytest
from transformers import AutoProcessor

from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.prompt_settings import PromptSettings
from tests.families.agreement import SIZES, picture
from tests.families.factory import FAMILIES

BEGINNING = {"llava", "llava_next", "gemma3", "paligemma2", "mistral3"}
"""Families whose models were trained with a beginning of the text, whoever writes it."""


def tokens(inputs: PolicyInputs, prompt: str = "What now?") -> list[int]:
    return inputs.encode([prompt], [picture(0, SIZES[0])])["input_ids"][0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_begins_once_where_the_model_was_trained_with_a_beginning(name, family_folder):
    inputs = PolicyInputs.load(str(family_folder(name)))
    beginning = inputs.tokenizer.bos_token_id
    found = tokens(inputs)
    assert found.count(beginning) == (1 if name in BEGINNING or name in ("idefics3", "smolvlm") else 0)
    if name in BEGINNING - {"paligemma2"}:
        assert found[0] == beginning


@pytest.mark.parametrize("name", FAMILIES)
def test_a_systems_turn_stands_before_the_prompt(name, family_folder):
    folder = str(family_folder(name))
    plain, told = (PolicyInputs.load(folder, prompts=PromptSettings(system_prompt=s)) for s in (None, "Be brief."))
    text = told.tokenizer.decode(tokens(told))
    assert text.index("Be brief.") < text.index("What now?")
    assert "Be brief." not in plain.tokenizer.decode(tokens(plain))


@pytest.mark.parametrize(
    ("name", "ends", "own"),
    [
        ("qwen2_5_vl", {"<|im_end|>", "<|endoftext|>"}, "<|im_end|>"),
        ("gemma3", {"<eos>", "<end_of_turn>"}, "<end_of_turn>"),
        ("glm4v", {"<|endoftext|>", "<|user|>", "<|observation|>"}, "<|endoftext|>"),
        ("llava_next", {"</s>"}, "</s>"),
    ],
)
def test_every_end_of_a_turn_ends_a_response(name, ends, own, family_folder):
    inputs = PolicyInputs.load(str(family_folder(name)))
    ids = inputs.tokenizer.convert_tokens_to_ids
    assert inputs.end_ids == {ids(end) for end in ends}
    assert inputs.end_ids.isdisjoint(inputs.forbidden_ids)
    # A demonstrated response ends as the chat template ends a turn.
    answer = '{"thoughts": "3 is below 5", "action": "+"}'
    written = inputs.encode_response(answer)
    assert written[-1] == ids(own)
    for end in inputs.end_ids:
        assert inputs.read([*written[:-1], end]).text == answer


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_vocabulary_without_a_token_are_forbidden(name, family_folder):
    inputs = PolicyInputs.load(str(family_folder(name)))
    rows = {"qwen3_vl": 1100, "llava_next": 63, "gemma3": 0}
    spare = [token for token in inputs.forbidden_ids if token >= len(inputs.tokenizer)]
    if name in rows:
        assert len(spare) == rows[name]
    pictures = inputs.tokenizer.convert_tokens_to_ids(inputs.processor.image_token)
    assert pictures in inputs.forbidden_ids
    assert inputs.tokenizer.convert_tokens_to_ids("A") not in inputs.forbidden_ids


def test_a_pictures_tokens_are_bounded_where_the_processor_has_bounds(family_folder):
    folder = str(family_folder("qwen2_5_vl"))
    shown = picture(0, (224, 224))

    def count(**bounds: int) -> int:
        inputs = PolicyInputs.load(folder, prompts=PromptSettings(**bounds))
        image = inputs.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return inputs.encode([""], [shown])["input_ids"][0].tolist().count(image)

    assert count(max_pixels=4 * 28 * 28) == 4
    assert count() == 16
    assert count(min_pixels=36 * 28 * 28, max_pixels=64 * 28 * 28) == 64
    refused = "policy.max_pixels: the pictures of .* are prepared by LlavaNextImageProcessor, which has no such bound"
    with pytest.raises(UserError, match=refused):
        PolicyInputs.load(str(family_folder("llava_next")), prompts=PromptSettings(max_pixels=10_000))


def test_bounds_must_be_in_order():
    with pytest.raises(ValueError, match=r"min_pixels \(20\) must not exceed max_pixels \(10\)"):
        PromptSettings(min_pixels=20, max_pixels=10)


def test_a_model_without_a_chat_template_gets_a_plain_one(family_folder):
    inputs = PolicyInputs.load(str(family_folder("paligemma2")))
    assert inputs.render("What now?") == "<image>What now?"
    assert inputs.plain_chat_template is not None
    assert "labels" not in inputs.encode(["What now?"], [picture(0, SIZES[0])])
    assert PolicyInputs.load(str(family_folder("gemma3"))).plain_chat_template is None


def test_a_chat_template_that_refuses_is_one_line(family_folder):
    processor = AutoProcessor.from_pretrained(family_folder("gemma3"))
    processor.chat_template = "{{ raise_exception('no system turns here') if messages[0]['role'] == 'system' }}"
    inputs = PolicyInputs("it", processor, prompts=PromptSettings(system_prompt="Be brief."))
    with pytest.raises(
        UserError, match=r"'it': its chat template does not take .*: no system turns here \(try without"
    ):
        inputs.render("What now?")
