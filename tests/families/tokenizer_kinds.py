"""Small tokenizers of the kinds that real models have, trained on the tasks' words: nothing is downloaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gflowvlm.learner.tiny_policy import task_texts

TokenizerKind = Literal["qwen", "llama3", "smollm2", "gemma", "llama2", "mistral"]
"""Whose kind a tokenizer is of: byte-level BPE (the first three) or sentencepiece's (the others)."""

VOCABULARY = 640
"""Tokens that are learned at most; special ones come on top."""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

SENTENCES = (
    '{"current": 3, "target": 5, "thoughts": "3 is below 5", "action": "stay"}',
    '{"current": 12, "target": 5, "thoughts": "12 is above 5", "action": "return"}',
    '{"thoughts": "it is there", "action": "go to cabinet 1"}',
    'either "+5" or "-5" or "+7" or "-7"',
    "<think>the target is smaller</think><action>take apple 10 from shelf 2</action>",
    "You see a picture. Move to the target, one step at a time, and answer with one JSON object.\n\nThe keys are:\n",
    "Human: Assistant: user assistant system You are a helpful assistant.",
)
"""Beside the tasks' words: prompts and answers as they are written, so that punctuation merges as it really does."""


@dataclass(frozen=True)
class SpecialTokens:
    """A family's special tokens.

    Attributes:
        eos: Ends a text.
        pad: Fills up.
        bos: Begins a text, or None.
        others: Further ones, for example of turns and pictures.
        named: Those of `others` that the family's processor asks its tokenizer for, by attribute.
    """

    eos: str
    pad: str
    bos: str | None = None
    others: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()

    def all(self) -> list[str]:
        """Returns every token, in the order of their ids."""
        return list(dict.fromkeys([self.pad, self.eos, *([self.bos] if self.bos else []), *self.others]))


def build_tokenizer(kind: TokenizerKind, special: SpecialTokens) -> PreTrainedTokenizerFast:
    """Returns a trained tokenizer of a kind with a family's special tokens."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special.all()])
    if kind == "gemma":
        # Runs of line breaks are tokens of their own, which vLLM's Gemma 3 asks for by name.
        tokenizer.add_tokens([AddedToken("\n" * count, normalized=False, special=False) for count in range(1, 5)])
    if special.bos is not None and kind != "smollm2":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special.bos} $A",
            pair=f"{special.bos} $A {special.bos} $B",
            special_tokens=[(special.bos, tokenizer.token_to_id(special.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special.bos,
        eos_token=special.eos,
        pad_token=special.pad,
        unk_token=None if kind in ("qwen", "llama3", "smollm2") else "<unk>",
        extra_special_tokens=dict(special.named),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@lru_cache
def _trained(kind: TokenizerKind) -> str:
    return _byte_level(kind) if kind in ("qwen", "llama3", "smollm2") else _sentencepiece(kind)


def _texts() -> Sequence[str]:
    return [*task_texts(), *SENTENCES * 20]


def _byte_level(kind: TokenizerKind) -> str:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
    if kind == "smollm2":
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(QWEN_SPLIT if kind == "qwen" else GPT4_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return str(tokenizer.to_str())


def _sentencepiece(kind: TokenizerKind) -> str:
    """Byte-fallback BPE. Gemma writes spaces as they are, Llama 2 and Mistral put one before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # As sentencepiece learns: a word keeps the space before it, digits stand alone.
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"▁?\p{N}|▁?\p{L}+|▁?[^▁\p{L}\p{N}\n]+|▁|\n+"), behavior="isolated"
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    unspace = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        tokenizer.decoder = decoders.Sequence(unspace)
    elif kind == "llama2":
        # As transformers' LlamaTokenizer makes it.
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([*unspace, decoders.Strip(content=" ", left=1)])
    else:
        # As in the tokenizer.json of Mistral 7B v0.1 and of the LLaVAs made of it.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
        tokenizer.decoder = decoders.Sequence([*unspace, decoders.Strip(content=" ", left=1)])
    trained = json.loads(tokenizer.to_str())
    # The trainer takes bytes as special tokens only; they are ordinary ones.
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] == "<unk>"]
    return json.dumps(trained)
