"""What tokens are to a policy: which of them end a response, and which must never be sampled."""

from typing import Any

from transformers import AutoConfig, GenerationConfig


def end_ids(model: str, tokenizer: Any) -> frozenset[int]:
    """Returns every token that ends a response: those of the generation configuration, and the tokenizer's own.

    Args:
        model: Model directory or hub name.
        tokenizer: Its tokenizer.
    """
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    if ends is None:
        ends = []
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(int(end) for end in [*listed, tokenizer.eos_token_id] if end is not None)


def special_ids(tokenizer: Any) -> set[int]:
    """Returns the tokenizer's special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def spare_ids(model: str, tokenizer: Any) -> set[int]:
    """Returns the rows of a model's vocabulary that are no token of its tokenizer: most vocabularies are rounded up.

    Args:
        model: Model directory or hub name.
        tokenizer: Its tokenizer.
    """
    try:
        rows = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    except (OSError, ValueError):
        # A processor without a model next to it.
        return set()
    return set(range(rows)).difference(tokenizer.get_vocab().values())
