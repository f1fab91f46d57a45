"""From prompt and image to model inputs: the one way both sampler and learner use.

The sampler and the learner must see the same tokens and pixels, so the chat rendering and the
processor live here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, BatchFeature

from gflowvlm.shared.answer_formats import DEFAULT_FORMAT, AnswerFormat, ParsedResponse, answer_format
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.hub import require_at_hub
from gflowvlm.shared.prompt_inputs import PromptInputs, bound_pictures
from gflowvlm.shared.prompt_settings import PromptSettings
from gflowvlm.shared.response import DONE_TOKEN, ResponseLayout
from gflowvlm.shared.response_tokens import ResponseTokens
from gflowvlm.shared.vocabulary import end_ids, spare_ids, special_ids


@dataclass(frozen=True)
class ReadResponse:
    """What a response's tokens say.

    Attributes:
        text: Their text, special tokens kept, without a last end token.
        parsed: What was read out of it.
        layout: Where chain of thought, action and stop action stand in the tokens.
    """

    text: str
    parsed: ParsedResponse
    layout: ResponseLayout


@dataclass(eq=False)
class PolicyInputs:
    """A policy's processor, with what the project needs to know of its tokenizer.

    Attributes:
        model: Model directory or hub name, as it was loaded.
        processor: The transformers processor.
        answer_format: How the policy answers.
        prompts: What the user says of prompts.
    """

    model: str
    processor: Any
    answer_format: AnswerFormat = field(default_factory=lambda: answer_format(DEFAULT_FORMAT))
    prompts: PromptSettings = field(default_factory=PromptSettings)

    @classmethod
    def load(cls, model: str, answers: str = DEFAULT_FORMAT, prompts: PromptSettings | None = None) -> "PolicyInputs":
        """Loads the processor of a model directory or hub name.

        Args:
            model: The model.
            answers: Name of the answer format (``task.answer_format``); only who reads or writes responses needs it.
            prompts: System prompt and bounds of pictures (a run's ``policy``); only who puts prompts to the model needs
                them.

        Raises:
            UserError: No such model, no processor in it, no such answer format, or a processor without such bounds.
        """
        settings = PromptSettings() if prompts is None else prompts
        path = directory_or_hub_name(model)
        require_at_hub(path)
        try:
            processor = AutoProcessor.from_pretrained(path)
            bound_pictures(processor, settings, model)
        # RuntimeError: a torchvision that was built for another torch.
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            if Path(path).is_dir() and not (Path(path) / "config.json").exists():
                raise UserError(
                    f"model {model!r}: no model in that folder (no config.json); give the folder that has one, or, "
                    "where `gflowvlm sft` was stopped there, go on with its --resume"
                ) from None
            raise UserError(f"model {model!r}: its processor cannot be loaded ({one_line(error)})") from None
        return cls(path, processor, answer_format(answers), settings)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @cached_property
    def done_id(self) -> int | None:
        """Token id of `[DONE]`, or None when the tokenizer does not have it as one token.

        A token that brings a space along does not count: it cannot stand behind a quotation mark.
        """
        done = self.tokenizer.convert_tokens_to_ids(DONE_TOKEN)
        if done is None or done == self.tokenizer.unk_token_id:
            return None
        tokens = ResponseTokens(self.tokenizer, None)
        before = self.tokenizer.encode("a", add_special_tokens=False)
        return int(done) if tokens.decode([*before, done]) == tokens.decode(before) + DONE_TOKEN else None

    @cached_property
    def _tokens(self) -> ResponseTokens:
        return ResponseTokens(self.tokenizer, self.done_id)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends a response."""
        return end_ids(self.model, self.tokenizer)

    @cached_property
    def end_id(self) -> int:
        """The token that a demonstrated response ends with: the one that ends a turn in the chat template."""
        behind = self.tokenizer.encode(self._prompts.end_of_turn(), add_special_tokens=False)
        return next((token for token in behind if token in self.end_ids), int(self.tokenizer.eos_token_id))

    @cached_property
    def forbidden_ids(self) -> list[int]:
        """Tokens that must not be sampled inside a response: special ones but `[DONE]` and ends, and spare rows."""
        forbidden = special_ids(self.tokenizer) | spare_ids(self.model, self.tokenizer)
        return sorted(forbidden - {self.done_id} - self.end_ids)

    @cached_property
    def _prompts(self) -> PromptInputs:
        return PromptInputs(self.model, self.processor, self.prompts)

    @property
    def adds_beginning(self) -> bool:
        """Whether a rendered prompt still lacks the beginning of the text, which its tokenizer then has to add."""
        return self._prompts.adds_beginning

    @property
    def has_token_types(self) -> bool:
        """Whether tokens of a picture or of the whole prompt see each other, as in Gemma 3 and PaliGemma."""
        return self._prompts.has_token_types

    @property
    def plain_chat_template(self) -> str | None:
        """The chat template that a model without one gets; None where it has its own."""
        return self._prompts.plain_chat_template

    def render(self, prompt: str, pictures: int = 1) -> str:
        """Returns the prompt as the model expects it: chat template, picture placeholders, generation prompt."""
        return self._prompts.render(prompt, pictures)

    def encode(self, prompts: Sequence[str], images: Sequence[bytes]) -> BatchFeature:
        """Returns left-padded model inputs for prompts with what is shown with each (`shared.pictures`).

        ``input_ids`` and ``attention_mask`` have shape (N, L); pixel tensors are the processor's own.
        """
        return self._prompts.encode(prompts, images)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of response tokens, `[DONE]` kept, a last end token dropped."""
        return self._tokens.decode(self._without_end(token_ids))

    def encode_response(self, text: str) -> list[int]:
        """Returns the tokens of a demonstration's response, end token last. They give exactly the text back.

        Raises:
            UserError: The tokenizer has no tokens that do.
        """
        ids = self.encode_if_possible(text)
        if ids is None:
            raise UserError(f"model {self.model!r}: its tokenizer has no tokens that give {text!r} back")
        return ids

    def encode_if_possible(self, text: str) -> list[int] | None:
        """Returns what `encode_response` does, None where the tokenizer has no tokens that give the text back."""
        ids = self._tokens.encode(text)
        return None if ids is None else [*ids, self.end_id]

    def characters(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Returns which characters of their text each of a response's tokens gives; none for an end token."""
        ids = self._without_end(token_ids)
        text = self._tokens.decode(ids)
        borders = [0, *(self._tokens.reach(ids[:count], text) for count in range(1, len(ids) + 1))]
        borders += [len(text)] * (len(token_ids) - len(ids))
        return list(pairwise(borders))

    def read(self, token_ids: Sequence[int]) -> ReadResponse:
        """Reads a response, whatever it is.

        Args:
            token_ids: The tokens exactly as sampled, an end token last where there is one.
        """
        ids = self._without_end(token_ids)
        text = self._tokens.decode(ids)
        parsed = self.answer_format.parse(text)
        if parsed.frame_chars is None:
            return ReadResponse(text, parsed, ResponseLayout.malformed(len(token_ids)))
        return ReadResponse(text, parsed, self._layout(ids, text, parsed, parsed.frame_chars))

    def with_action(self, token_ids: Sequence[int], action: str) -> list[int] | None:
        """Returns the response with another action behind the very same tokens of its chain of thought.

        Returns:
            The tokens, end token last; None where no action can be read, or none of the tokenizer's tokens write the
            action there.
        """
        ids = self._without_end(token_ids)
        text = self._tokens.decode(ids)
        parsed = self.answer_format.parse(text)
        if parsed.frame_chars is None:
            return None
        kept = self._tokens.token_of(ids, text, parsed.frame_chars[0])
        written = self._behind(ids[:kept], text, self.answer_format.with_action(text, parsed, action))
        return None if written is None else [*ids[:kept], *written, self.end_id]

    def _layout(self, ids: list[int], text: str, parsed: ParsedResponse, frame: tuple[int, int]) -> ResponseLayout:
        cot_end = self._tokens.token_of(ids, text, frame[0])
        last = self._tokens.token_of(ids, text, frame[1] - 1, first=cot_end)
        if parsed.action == DONE_TOKEN:
            action_end = self._end_of_stop(ids, cot_end, last)
            return ResponseLayout(cot_end, action_end, ids[cot_end:action_end])
        return ResponseLayout(cot_end, last + 1, self._stop_ids(ids[:cot_end], text, parsed))

    def _stop_ids(self, thought: list[int], text: str, parsed: ParsedResponse) -> list[int]:
        """Returns the tokens of the stop action behind a chain of thought; none where there are none."""
        stopping = self.answer_format.with_action(text, parsed, DONE_TOKEN)
        _, end = self.answer_format.parse(stopping).frame_chars or (0, len(stopping))
        if self.done_id is not None:
            # It ends there: what follows is not asked for.
            stopping = stopping[: stopping.rindex(DONE_TOKEN, 0, end) + len(DONE_TOKEN)]
        written = self._behind(thought, text, stopping)
        if written is None or self.done_id is not None:
            return written or []
        whole = [*thought, *written]
        return whole[len(thought) : self._tokens.token_of(whole, stopping, end - 1, first=len(thought)) + 1]

    def _end_of_stop(self, ids: list[int], start: int, last: int) -> int:
        """Returns where a stop action ends: behind its own token where it has one, else behind what closes it."""
        if self.done_id in ids[start : last + 1]:
            return ids.index(self.done_id, start) + 1
        return last + 1

    def _behind(self, kept: list[int], text: str, other: str) -> list[int] | None:
        """Returns tokens that make `other` of the first tokens of a text; None where there are none."""
        reached = self._tokens.reach(kept, text)
        return self._tokens.continuation(kept, other[:reached], other[reached:])

    def _without_end(self, token_ids: Sequence[int]) -> list[int]:
        ids = list(token_ids)
        return ids[:-1] if ids and ids[-1] in self.end_ids else ids


def directory_or_hub_name(model: str) -> str:
    """Returns a directory that exists, or a hub name.

    Raises:
        UserError: It is a path and no directory, or a relative one: whether that is found depends on where a process
            stands, and a name of a hub's model would load a folder of the same name instead.
    """
    absolute, there = Path(model).is_absolute(), Path(model).is_dir()
    if absolute and not there:
        raise UserError(f"model {model!r}: no such directory; give a model directory, a hub name or a shipped model")
    if not absolute and (there or model.startswith((".", "~"))):
        raise UserError(f"model {model!r}: is a relative path; write the absolute path of its directory instead")
    return model
