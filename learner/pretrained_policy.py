"""A vision-language model around a pretrained language model: Idefics3 with a small vision tower of ours.

The language model and its tokenizer are read from one GGUF file, the vision tower is a tiny policy's. The connector
between them is new; `gflowvlm.learner.alignment` teaches it to write words that the language model knows.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from gflowvlm.learner.tiny_policy import build_image_processor
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.policy_inputs import PolicyInputs

_IMAGE_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
"""Special tokens that an Idefics3 processor writes; a language model's tokenizer has none of them."""

_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
"""ChatML's marks, with which instruct models of this kind were trained."""

_MAX_POSITIONS = 2048
"""Longest prompt and response together that is asked for, tokens; the language model's own limit may be lower."""

# ChatML as instruct models write it, without a system message; parts of a message stand in their order.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_gguf(gguf: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """Returns the causal language model of a GGUF file, its quantised weights as float32, and its tokenizer.

    Raises:
        UserError: The file cannot be read, holds another architecture than Llama's, or its tokenizer has no ChatML.
    """
    # Bars for reading local files say nothing.
    transformers_logging.disable_progress_bar()
    try:
        # The bar for the conversion is not transformers' own, and goes to whatever stderr is.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            language = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{gguf}: cannot be read as a language model ({one_line(error)})") from None
    if language.config.model_type != "llama":
        raise UserError(f"{gguf}: holds a {language.config.model_type!r} model; only Llama's architecture is supported")
    if not {_TURN_START, _TURN_END} <= tokenizer.get_vocab().keys():
        raise UserError(
            f"{gguf}: its tokenizer has no {_TURN_START} and {_TURN_END}; only models of ChatML are supported"
        )
    return language, tokenizer


def join_pretrained(
    language: Any, tokenizer: PreTrainedTokenizerFast, vision: Path | str, seed: int = 0
) -> tuple[Any, PolicyInputs]:
    """Returns an Idefics3 of a language model and a tiny policy's vision tower, and its inputs.

    Args:
        language: A causal language model of Llama's architecture, float32.
        tokenizer: Its tokenizer, which has the tokens of ChatML; the processor's tokens are added to it.
        vision: Folder of an Idefics3 made by `build_tiny_policy`, whose vision tower is taken over.
        seed: Seed of the connector's weights.
    """
    tower = AutoModelForImageTextToText.from_pretrained(vision, dtype=torch.float32)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, normalized=False, special=True) for t in _IMAGE_TOKENS]}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _joined(language, tower, tokenizer)
    side = tower.config.vision_config.image_size // tower.config.vision_config.patch_size // tower.config.scale_factor
    processor = Idefics3Processor(
        build_image_processor(), tokenizer, image_seq_len=side**2, chat_template=_CHAT_TEMPLATE
    )
    return network, PolicyInputs(tokenizer.name_or_path, processor)


def _joined(language: Any, tower: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Returns an Idefics3 of both parts with rows for every token of the tokenizer."""
    text = language.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures"):
        text.pop(name, None)
    text["max_position_embeddings"] = min(text["max_position_embeddings"], _MAX_POSITIONS)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Idefics3Config(
        text_config={**text, **special},
        vision_config=tower.config.vision_config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=tower.config.scale_factor,
        tie_word_embeddings=language.config.tie_word_embeddings,
        **special,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.model.vision_model.load_state_dict(tower.model.vision_model.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[rows:] = layer.weight[:rows].mean(dim=0)
    return model
