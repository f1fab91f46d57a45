"""What a family of the matrix is, and the sizes that its instances share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from tests.families.tokenizer_kinds import SpecialTokens, TokenizerKind

PATCH = 14
SIDE = 56
"""Side of the picture that a vision tower with one size takes, pixels."""

PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
"""Sizes of pictures in tiles."""

MAX_POSITIONS = 2048
HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 32


@dataclass(frozen=True)
class Family:
    """How an instance of a family is made.

    Attributes:
        label: What its users call it.
        kind: Kind of its tokenizer.
        special: Its special tokens.
        config: Returns the model's configuration for a tokenizer.
        processor: Returns the processor for a tokenizer.
        ends: Tokens that the family's generation configuration ends a response with.
        generation: What else stands in its generation configuration.
    """

    label: str
    kind: TokenizerKind
    special: SpecialTokens
    config: Callable[[Any], PretrainedConfig]
    processor: Callable[[Any], Any]
    ends: tuple[str, ...]
    generation: dict[str, Any] = field(default_factory=dict)


def text_sizes(tokenizer: Any, spare: int = 0, **more: Any) -> dict[str, Any]:
    """Sizes of a language model. Some families have spare rows in their vocabulary, past the last token."""
    return {
        "vocab_size": len(tokenizer) + spare,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def qwen_text_sizes(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Sizes where heads are as wide as the states divided by their number."""
    sizes = {name: value for name, value in text_sizes(tokenizer, spare=63, **more).items() if name != "head_dim"}
    return {**sizes, "hidden_size": HEADS * HEAD_DIM}


def vision_sizes(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


def token_id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}
