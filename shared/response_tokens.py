"""The tokens of responses: where text stands in them, and which tokens write a text behind others.

Right for every kind of tokenizer: a token may cross the borders of an answer, hold a part of a character only, or
come back with a space that nobody wrote. Nothing is taken for granted of what a tokenizer makes of a text; what is
returned was decoded and compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gflowvlm.shared.response import DONE_TOKEN

_NEIGHBOURS = ("", "\n", "a", "0", ".", '"')
"""Texts behind which a continuation is encoded when it cannot be taken from the encoding of what it continues."""

_TOKENS_BEFORE = (1, 2, 4, 8, 16)
"""How many tokens before the cut are encoded with a continuation where the whole text does not have a border there."""


_BYTES_OF_A_CHARACTER = 4


@dataclass(frozen=True)
class ResponseTokens:
    """A tokenizer, as it is used on responses. End tokens are no part of them here.

    Attributes:
        tokenizer: The transformers tokenizer.
        done_id: Token id of the stop action, None where it is no token of its own.
    """

    tokenizer: Any
    done_id: int | None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of tokens, special tokens kept."""
        return str(
            self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def reach(self, token_ids: Sequence[int], text: str) -> int:
        """Returns how many characters of a text the tokens, which begin it, give in full; never fewer for more tokens.

        Tokens that end in a part of a character are decoded to others, and some tokenizers then decode the whole
        characters before it, given byte by byte, to others, too: fewer tokens may say more.
        """
        most = 0
        for count in range(len(token_ids), max(len(token_ids) - _BYTES_OF_A_CHARACTER, -1), -1):
            given = self.decode(token_ids[:count])
            if text.startswith(given):
                return max(most, len(given))
            pairs = enumerate(zip(given, text, strict=False))
            most = max(most, next((number for number, (one, other) in pairs if one != other), 0))
        return most

    def token_of(self, token_ids: Sequence[int], text: str, char: int, first: int = 0) -> int:
        """Returns the index of the token with which a character of their text is complete.

        Args:
            token_ids: The tokens.
            text: Their text.
            char: Index of the character.
            first: A token before which it is not complete.
        """
        low, high = first, max(len(token_ids) - 1, 0)
        reached_low, reached_high = self.reach(token_ids[:low], text) if low > 0 else 0, len(text)
        while low < high:
            # Where it would be if all tokens between had as many characters: nearly always right after a few tries.
            guess = low + (char - reached_low) * (high - low) // max(reached_high - reached_low, 1)
            middle = min(max(guess, low), high - 1)
            reached = self.reach(token_ids[: middle + 1], text)
            if reached > char:
                high, reached_high = middle, reached
            else:
                low, reached_low = middle + 1, reached
        return low

    def encode(self, text: str) -> list[int] | None:
        """Returns the tokens of a text, the stop action as one token where it is one; None if they do not give it back.

        They are the tokenizer's own wherever these give the text back.
        """
        ids = self._encoded(text)
        if self._stops(ids) == self._stops_in(text) and self.decode(ids) == text:
            return ids
        return self.continuation([], "", text)

    def continuation(self, before: Sequence[int], text: str, more: str) -> list[int] | None:
        """Returns tokens that write `more` behind others, or None where there are none that come back as that.

        Args:
            before: The tokens in front, whatever made them.
            text: The text that they give.
            more: The text to write; the stop action in it becomes one token where it is one.
        """
        ids = list(before)
        parts = [more] if self.done_id is None else more.split(DONE_TOKEN)
        for number, part in enumerate(parts):
            if number > 0 and self.done_id is not None:
                ids.append(self.done_id)
                text += DONE_TOKEN
            written = self._written(ids, text, part)
            if written is None:
                return None
            ids += written
            text += part
        return ids[len(before) :] if self.decode(ids) == text else None

    def _written(self, before: list[int], text: str, more: str) -> list[int] | None:
        """Returns tokens of a text without a stop action behind others, as the tokenizer would write it there."""
        if more == "":
            return []
        for anchor in self._anchors(before, text):
            ids = self._encoded(anchor + more)
            border = self.token_of(ids, anchor + more, len(anchor) - 1) + 1 if anchor else 0
            written = ids[border:]
            # Only where a border falls on the cut does the text come back behind the tokens that are really there.
            if self.decode([*before, *written]) == text + more:
                return written
        return None

    def _anchors(self, before: list[int], text: str) -> Iterator[str]:
        """Yields texts behind which a continuation may be written as behind all of them."""
        counts = [count for count in _TOKENS_BEFORE if count < len(before)]
        # Most often the last few tokens are enough, and soon encoded.
        if counts:
            yield text[self.reach(before[: -counts[-1]], text) :]
        yield text
        for count in counts[:-1]:
            yield text[self.reach(before[:-count], text) :]
        yield from _NEIGHBOURS

    def _encoded(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def _stops(self, token_ids: Sequence[int]) -> int:
        return 0 if self.done_id is None else list(token_ids).count(self.done_id)

    def _stops_in(self, text: str) -> int:
        return 0 if self.done_id is None else text.count(DONE_TOKEN)
