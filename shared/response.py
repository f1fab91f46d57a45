"""The stop action, and where chain of thought and action stand in a response's tokens."""

from dataclasses import dataclass, field

DONE_TOKEN = "[DONE]"
"""The stop action. A tokenizer may have it as one token of its own."""


@dataclass(frozen=True)
class ResponseLayout:
    """Where chain of thought, action and stop action stand in a response's tokens.

    `PolicyInputs.read` makes it: what it says depends on the tokenizer. The action begins with the first token that
    reaches into its value or into the one character in front of it, a rule on the text alone: behind one chain of
    thought all actions begin at the same place. It ends with the token that holds the first character behind its
    value. So no action's tokens are the beginning of another's, and their probabilities add up to 1 at most.

    Attributes:
        cot_end: Tokens ``[0, cot_end)`` are chain of thought.
        action_end: Tokens ``[cot_end, action_end)`` are the action with what ends it; equal to `cot_end`, the number
            of tokens, when malformed.
        stop_ids: The tokens of the stop action behind the same chain of thought: log P(⊤) is the sum of their
            log-probabilities. Where the response stops, its own tokens of the action. Empty where there is no place
            at which stopping could be scored.
    """

    cot_end: int
    action_end: int
    stop_ids: list[int] = field(default_factory=list)

    @classmethod
    def malformed(cls, tokens: int) -> "ResponseLayout":
        """Returns the layout of a malformed response of so many tokens: it is all chain of thought."""
        return cls(tokens, tokens)
