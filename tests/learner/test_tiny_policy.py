"""The tiny policy: its tokenizer's borders, its processor, and that it loads like any checkpoint."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from gflowvlm.learner.tiny_policy import build_lexicon_tokenizer, build_tiny_policy
from gflowvlm.shared.lexicon import Lexicon
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.shared.json_answers import format_response


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> PolicyInputs:
    return PolicyInputs.load(str(folder))


def picture(size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("action", ["+", "-", "[DONE]", "hit", "go to desk 1", "+1", ""])
@pytest.mark.parametrize("number", [3, 47])
def test_the_actions_value_begins_on_a_token_border(inputs: PolicyInputs, action: str, number: int) -> None:
    text = format_response(action, f"{number} is below 50", {"current": number, "target": 50})
    ids = inputs.encode_response(text)
    assert inputs.decode(ids) == text
    before = inputs.encode_response(text[: text.rindex(f'{action}"')])[:-1]
    assert ids[: len(before)] == before
    if action != "":
        assert inputs.decode(ids[len(before) :]) == f'{action}"}}'


@pytest.mark.parametrize("action", ["+", "-", "[DONE]"])
def test_number_line_actions_are_one_token(inputs: PolicyInputs, action: str) -> None:
    ids = inputs.encode_response(format_response(action, "", {}))
    layout = inputs.read(ids).layout
    # With what opens the value and, but for `[DONE]`, what closes it.
    assert layout.action_end - layout.cot_end == (2 if action == "[DONE]" else 3)


def test_digits_are_never_merged(inputs: PolicyInputs) -> None:
    pieces = [inputs.tokenizer.decode([i]) for i in range(len(inputs.tokenizer))]
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))


def test_done_is_not_among_the_forbidden_special_tokens(inputs: PolicyInputs) -> None:
    image = inputs.tokenizer.convert_tokens_to_ids("<image>")
    assert image in inputs.forbidden_ids
    assert not {inputs.done_id, inputs.end_id} & set(inputs.forbidden_ids)


def test_any_text_survives_the_tokenizer(inputs: PolicyInputs) -> None:
    text = 'ünïcode "quotes" 12,5\n\ttabs {"a": [1]} 木'
    assert inputs.decode(inputs.encode_response(text)) == text


def test_a_lexicons_entries_are_one_token_and_other_words_fall_apart_into_bytes() -> None:
    words = Lexicon(phrases=("go to ", ", go to ", "look", ' "', '"}'), names=("desk", "lookout", "to"))
    tokenizer = build_lexicon_tokenizer(words)

    def pieces(text: str) -> list[str]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        return [tokenizer.decode([i]) for i in ids]

    assert pieces("go to desk 1, go to lookout 12") == ["go to ", "desk", " 1", ", go to ", "lookout", " 1", "2"]
    assert pieces('look "[DONE]"}<end_of_utterance>') == ["look", ' "', "[DONE]", '"}', "<end_of_utterance>"]
    assert pieces("desks") == list("desks")
    assert tokenizer.decode(tokenizer.encode("木\n")) == "木\n"


@pytest.mark.parametrize("size", [64, 100])
def test_model_and_processor_fit_together(folder: Path, inputs: PolicyInputs, size: int) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    batch = inputs.encode(["short", "a longer prompt"], [picture(size), picture(size)])
    image = inputs.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(dim=1).tolist() == [16, 16]
    assert batch["pixel_values"].shape == (2, 1, 3, 64, 64)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, len(inputs.tokenizer))
    assert torch.isfinite(logits).all()
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000


def test_the_seed_fixes_the_weights(folder: Path, tmp_path: Path) -> None:
    again = build_tiny_policy(tmp_path / "again", seed=1)
    other = build_tiny_policy(tmp_path / "other", seed=2)
    weights = (folder / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights
