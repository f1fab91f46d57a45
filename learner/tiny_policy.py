"""A vision-language model small enough to be trained on two CPU cores: tiny Idefics3, own tokenizer.

The weights are random; `gflowvlm.learner.sft` teaches them. The folder that is written loads like any other
checkpoint (`AutoProcessor`, `AutoModelForImageTextToText`, vLLM).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from gflowvlm.shared.lexicon import Lexicon
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import task_names, task_settings_class

IMAGE_SIZE = 64
"""Side of the square picture the model sees, pixels; other pictures are resized to it."""

MAX_POSITIONS = 1024
"""Longest prompt and response together, tokens."""

_PATCH_SIZE = 8
_PIXEL_SHUFFLE = 2
_IMAGE_TOKENS = (IMAGE_SIZE // _PATCH_SIZE // _PIXEL_SHUFFLE) ** 2

_IMAGE_TOKEN = "<image>"
_PAD_TOKEN = "<pad>"
_START_TOKEN = "<start>"
_END_TOKEN = "<end_of_utterance>"
_SPECIAL_TOKENS = (
    _PAD_TOKEN,
    _START_TOKEN,
    _END_TOKEN,
    _IMAGE_TOKEN,
    "<fake_token_around_image>",
    "<global-img>",
)

# Keys of a response are one piece each and end where a value begins: `{"current": ` is one token and `3` the
# next. Digits stand alone, whatever precedes them. Runs of words are one piece too: few tokens make few steps
# of the engine, and a phrase the tokenizer was not made from still falls apart into words and bytes.
_PIECES = r"""\{"\p{L}+": "?|"?, "\p{L}+": "?|"\}|\d| ?\p{L}+(?: \p{L}+)*(?:: | )?|: |, |\n+|[^\s\p{L}\d]|\s"""

# With a lexicon: its phrases, then numbers digit by digit, then whole words, each with no space before it.
_LEXICON_PIECES = r""" ?\d|\p{L}+|\n+|[^\s\p{L}\d]|\s"""

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<start>' + message['role'] + ':' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ '\n' + part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<end_of_utterance>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny Idefics3.

    Attributes:
        vision_hidden: Width of the vision transformer.
        vision_layers: Its layers.
        vision_heads: Its attention heads.
        text_hidden: Width of the language model.
        text_mlp: Width inside its feed-forward layers.
        text_layers: Its layers.
        text_heads: Its query heads.
        key_value_heads: Its key and value heads.
        head_dim: Width of one head; vLLM's CPU attention wants a multiple of 32.
    """

    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 2
    text_hidden: int = 64
    text_mlp: int = 192
    text_layers: int = 3
    text_heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 32


def build_tiny_policy(
    directory: Path | str,
    seed: int = 0,
    shape: TinyShape | None = None,
    texts: Sequence[str] | None = None,
    vocabulary: int = 1024,
    lexicon: Lexicon | None = None,
) -> Path:
    """Writes a tiny Idefics3 with random weights, its tokenizer, processor and chat template.

    Args:
        directory: Where to write; made when it does not exist.
        seed: Seed of the weights.
        shape: Sizes; `TinyShape()` when None (about 0.3 million parameters).
        texts: What the byte-level BPE tokenizer learns its merges from; by default the words of all tasks.
        vocabulary: Largest number of tokens.
        lexicon: Makes the tokenizer instead of `texts` and `vocabulary`.

    Returns:
        The directory, which holds safetensors and JSON files only.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor(texts, vocabulary, lexicon)
    config = _config(shape or TinyShape(), processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    # A bar for one small file says nothing.
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_processor(
    texts: Sequence[str] | None = None, vocabulary: int = 1024, lexicon: Lexicon | None = None
) -> Idefics3Processor:
    """Returns the processor: own tokenizer, PIL image processor (needs no torchvision), chat template."""
    return Idefics3Processor(
        build_image_processor(),
        build_tokenizer(texts, vocabulary) if lexicon is None else build_lexicon_tokenizer(lexicon),
        image_seq_len=_IMAGE_TOKENS,
        chat_template=_CHAT_TEMPLATE,
    )


def build_image_processor() -> Idefics3ImageProcessorPil:
    """Returns the image processor: one picture is one square of `IMAGE_SIZE` pixels, and torchvision is not needed."""
    return Idefics3ImageProcessorPil(
        do_image_splitting=False,
        do_resize=False,
        size={"longest_edge": IMAGE_SIZE},
        max_image_size={"longest_edge": IMAGE_SIZE},
    )


def build_tokenizer(texts: Sequence[str] | None = None, vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer: `[DONE]` one token, digits single, values begin on token borders.

    It learns its merges from the words of all tasks where no other texts are given.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in _SPECIAL_TOKENS],
        show_progress=False,
    )
    learned = task_texts() if texts is None else texts
    tokenizer.train_from_iterator([text.replace(DONE_TOKEN, "") for text in learned], trainer)
    return _finished(tokenizer)


def task_texts() -> tuple[str, ...]:
    """Returns the words of all tasks, from which one tokenizer for all of them is made."""
    return tuple(text for name in task_names() for text in task_settings_class(name).tokenizer_texts)


def build_lexicon_tokenizer(lexicon: Lexicon) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each phrase, name, digit and byte of a lexicon, and for `[DONE]`.

    Nothing is merged: a piece that is no entry is written byte by byte.
    """
    entries = [*lexicon.phrases, *lexicon.names, *(f" {digit}" for digit in range(10))]
    longest_first = sorted(lexicon.phrases, key=lambda phrase: (-len(phrase), phrase))
    # A phrase that ends in a letter must not be the beginning of a longer word.
    alternatives = [re.escape(text) + (r"(?!\p{L})" if text[-1].isalpha() else "") for text in longest_first]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [*_SPECIAL_TOKENS, *sorted(byte_level.alphabet())]
    pieces += [byte_level.pre_tokenize_str(text)[0][0] for text in entries]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex("|".join([*alternatives, _LEXICON_PIECES])), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL_TOKENS])
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Adds `[DONE]` and says which special token is for what."""
    # An ordinary added token: a response may hold it, and decoding that skips special tokens keeps it.
    tokenizer.add_tokens([AddedToken(DONE_TOKEN, normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START_TOKEN,
        eos_token=_END_TOKEN,
        pad_token=_PAD_TOKEN,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _config(shape: TinyShape, tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.text_hidden,
        intermediate_size=shape.text_mlp,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        **special,
    )
    vision = {
        "hidden_size": shape.vision_hidden,
        "intermediate_size": 2 * shape.vision_hidden,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": IMAGE_SIZE,
        "patch_size": _PATCH_SIZE,
    }
    return Idefics3Config(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN),
        scale_factor=_PIXEL_SHUFFLE,
        tie_word_embeddings=False,
        **special,
    )
