"""What a task says of its words, for a tokenizer made of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lexicon:
    """What the tokenizer of one task has a token of its own for; all other text falls apart into bytes.

    Attributes:
        phrases: Runs of text that stand in every prompt and response, with the spaces around them.
        names: Single words that stand between them, which the policy is to copy.
    """

    phrases: tuple[str, ...]
    names: tuple[str, ...]
