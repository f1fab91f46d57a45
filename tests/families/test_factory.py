"""The instances are of the real classes, load like models of a hub, and their tokenizers are of the families' kinds."""

import pytest
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from tests.families.factory import FAMILIES
from tests.families.tokenizer_kinds import SpecialTokens, build_tokenizer

ANSWER = '{"current": 3, "target": 5, "thoughts": "3 is below 5", "action": "%s"}'


@pytest.mark.parametrize("name", FAMILIES)
def test_an_instance_loads_by_its_own_classes(name, family_folder):
    folder = family_folder(name)
    processor = AutoProcessor.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).model_type == name.replace("paligemma2", "paligemma")
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert processor.tokenizer.convert_ids_to_tokens(ends) == list(FAMILIES[name].ends)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(
    ("kind", "plus", "tenth"),
    [
        ("qwen", [' "+', '"}'], [" ", "1", "0", '"}']),
        ("llama3", [' "+', '"}'], [" ", "10", '"}']),
        ("smollm2", [' "+', '"}'], [" ", "1", "0", '"}']),
        ("gemma", [' "+', '"}'], [" 1", "0", '"}']),
        ("llama2", [' "+', '"}'], [" 1", "0", '"}']),
        ("mistral", [' "+', '"}'], [" 1", "0", '"}']),
    ],
)
def test_tokens_cross_the_borders_of_an_answers_values_as_those_of_real_tokenizers_do(kind, plus, tenth):
    tokenizer = build_tokenizer(kind, SpecialTokens(eos="</s>", pad="<pad>", bos="<s>"))

    def last_pieces(action: str, count: int) -> list[str]:
        ids = tokenizer.encode(ANSWER % action, add_special_tokens=False)[-count:]
        return [piece.replace("Ġ", " ").replace("▁", " ") for piece in tokenizer.convert_ids_to_tokens(ids)]

    assert last_pieces("+", len(plus)) == plus
    assert last_pieces("go to cabinet 10", len(tenth)) == tenth
    assert tokenizer.decode(tokenizer.encode(ANSWER % "+", add_special_tokens=False)) == ANSWER % "+"
