"""The model around a pretrained language model: what it holds, how it is prompted, and reading a GGUF file."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from gflowvlm.envs.registry import make_env
from gflowvlm.learner.pretrained_policy import join_pretrained, read_gguf
from gflowvlm.learner.sft import SftSettings, load_for_sft
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import default_settings
from tests.learner.made_language_models import tiny_language_model, tiny_tokenizer, write_gguf

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="pip install gguf")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("vision"), seed=3)


@pytest.fixture(scope="module")
def folder(vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("joined")
    tokenizer = tiny_tokenizer()
    network, inputs = join_pretrained(tiny_language_model(tokenizer), tokenizer, vision, seed=1)
    network.save_pretrained(made)
    inputs.processor.save_pretrained(made)
    return made


def test_it_holds_the_language_model_and_the_vision_tower_unchanged(folder: Path, vision: Path) -> None:
    made = AutoModelForImageTextToText.from_pretrained(folder)
    tower = AutoModelForImageTextToText.from_pretrained(vision).model.vision_model.state_dict()
    language = tiny_language_model(tiny_tokenizer())
    assert all(torch.equal(made.model.vision_model.state_dict()[name], weight) for name, weight in tower.items())
    of_text = made.model.text_model.state_dict()
    for name, weight in language.model.state_dict().items():
        assert torch.equal(of_text[name][: len(weight)], weight), name
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight


def test_without_a_picture_it_says_what_the_language_model_says(folder: Path) -> None:
    made, language = AutoModelForImageTextToText.from_pretrained(folder), tiny_language_model(tiny_tokenizer()).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = language(tokens).logits
        said = made.eval()(input_ids=tokens).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(said, expected)


def test_a_prompt_has_a_picture_and_chatml_and_can_be_answered(folder: Path) -> None:
    network, inputs = load_for_sft(str(folder), SftSettings(train_embeddings=False), done_token=True)
    env = make_env(default_settings("numberline"))
    env.reset(seed=3)
    rendered = inputs.render(env.prompt())
    assert rendered.startswith("<|im_start|>user\n<image>\nMake the current number")
    assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n")
    batch = inputs.encode([env.prompt()] * 2, [env.image_png()] * 2)
    image = inputs.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(dim=1).tolist() == [16, 16]
    assert torch.isfinite(network(**batch).logits).all()
    assert inputs.tokenizer.decode([inputs.end_id]) == "<|im_end|>"
    assert inputs.done_id is not None
    assert {image, inputs.tokenizer.convert_tokens_to_ids("<end_of_utterance>")} <= set(inputs.forbidden_ids)


def test_a_response_keeps_its_text_and_the_spans_of_its_action(folder: Path) -> None:
    _, inputs = load_for_sft(str(folder), SftSettings(train_embeddings=False), done_token=True)
    text = '{"current": 3, "target": 15, "thoughts": "3 is below 15", "action": "[DONE]"}'
    read = inputs.read(inputs.encode_response(text))
    assert read.text == text
    assert read.parsed.action == "[DONE]"
    assert read.layout.stop_ids[-1] == inputs.done_id


@needs_gguf
def test_a_gguf_file_gives_the_very_weights_and_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    language, tokenizer = read_gguf(tmp_path / "tiny.gguf")
    assert capfd.readouterr() == ("", "")
    for name, weight in written.state_dict().items():
        assert torch.equal(language.state_dict()[name], weight), name
    text = 'Answer: {"current": 37, "action": "+"} ü木'
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == "<|im_end|>"


@needs_gguf
def test_a_gguf_file_without_chatml_is_a_user_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", special=("<a>", "<b>", "<c>"))
    with pytest.raises(UserError, match="only models of ChatML"):
        read_gguf(tmp_path / "tiny.gguf")


@needs_gguf
def test_a_file_that_is_no_gguf_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_text("no model")
    with pytest.raises(UserError, match="cannot be read as a language model"):
        read_gguf(tmp_path / "tiny.gguf")
