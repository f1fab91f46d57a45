"""Small tokenizers of the kinds that models come with, trained on answers: their tokens cross the borders, too."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gflowvlm.shared.answer_formats import answer_format
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]

ACTIONS = (
    ("+", "-", DONE_TOKEN),
    ("stand", "hit", DONE_TOKEN),
    ("1", "10", "100", "12", "-2", DONE_TOKEN),
    (
        "go to cabinet 1",
        "go to cabinet 10",
        "go to cabinet",
        "take apple 1 from cabinet 10",
        "look",
        "inventory",
        "help",
        DONE_TOKEN,
    ),
    (
        "Straße öffnen",
        "öffne Tür 1",
        "öffne Tür 12",
        "打开柜子",
        "打开柜子1",
        "😀",
        "😀😀",
        "👨‍👩‍👧 winken",
        DONE_TOKEN,
    ),
    ('say "hi"', "say", "a<b", "a<b&lt;c", "\\", "", " ", DONE_TOKEN),
)
"""Actions that are admissible together."""

FIELDS = ({"current": 3, "target": 15}, {"place": "cabinet 1, Küche", "hand": "nothing"}, {})
THOUGHTS = ("3 is below 15", "I still need the äpfel", "目标在右边 😀", "")


def answers(name: str) -> list[str]:
    """Returns answers in one format, with all actions."""
    written = answer_format(name)
    return [
        written.render(action, thought, FIELDS[number % len(FIELDS)])
        for number, thought in enumerate(THOUGHTS)
        for actions in ACTIONS
        for action in actions
    ]


def _byte_level(split: str | None) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        # GPT-2's own split, and digits alone, as in SmolLM2.
        first = pre_tokenizers.Digits(True) if split is None else pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    return make


def _sentencepiece(prepended: bool) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        spaces = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepended else spaces
        stripped = [decoders.Strip(" ", 1, 0)] if prepended else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
        )
        return tokenizer

    return make


def _metaspace(scheme: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])
        )
        return tokenizer

    return make


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level, Qwen's split": _byte_level(QWEN_SPLIT),
    "byte level, GPT-4's split": _byte_level(GPT4_SPLIT),
    "byte level, single digits": _byte_level(None),
    "sentencepiece, space prepended": _sentencepiece(prepended=True),
    "sentencepiece, nothing prepended": _sentencepiece(prepended=False),
    "metaspace, always": _metaspace("always"),
    "metaspace, first": _metaspace("first"),
    "metaspace, never": _metaspace("never"),
}

DONE = {
    "no [DONE]": None,
    "[DONE]": AddedToken(DONE_TOKEN, normalized=False, special=False),
    "[DONE] normalized": AddedToken(DONE_TOKEN, normalized=True, special=False),
}


def make_tokenizer(kind: str, done: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of one of `KINDS`, with `[DONE]` as one of `DONE` says."""
    tokenizer = KINDS[kind]()
    texts = [text.replace(DONE_TOKEN, "") for name in ("json", "tags") for text in answers(name)]
    # Rare characters are left to bytes.
    alphabet = sorted({c for text in texts for c in text if ord(c) < 0x250} | {"▁"})
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    bytes_as_tokens = [] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + len(alphabet) + 150,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else alphabet,
        limit_alphabet=256 if byte_level else len(alphabet),
        special_tokens=SPECIAL + bytes_as_tokens,
        max_token_length=9,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    if not byte_level:
        tokenizer = _with_bytes_as_pieces(tokenizer)
    added = DONE[done]
    if added is not None:
        tokenizer.add_tokens([added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _with_bytes_as_pieces(tokenizer: Tokenizer) -> Tokenizer:
    """Makes the bytes ordinary pieces of the vocabulary: as special tokens they would be found in texts."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


def inputs_of(tokenizer: Any, answers_as: str) -> PolicyInputs:
    """Returns what a policy's responses are read with, for a tokenizer alone: nobody is shown a picture."""
    ends = "{% for message in messages %}{{ message['content'][-1]['text'] }}EOS{% endfor %}"
    tokenizer.chat_template = ends.replace("EOS", tokenizer.eos_token)
    processor = SimpleNamespace(
        tokenizer=tokenizer, chat_template=ends, apply_chat_template=tokenizer.apply_chat_template
    )
    return PolicyInputs("/nowhere", processor, answer_format(answers_as))
