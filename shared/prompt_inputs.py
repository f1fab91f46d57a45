"""From prompt and pictures to model inputs: chat template, beginning of the text, picture placeholders, pixels."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import BatchFeature

from gflowvlm.shared.errors import UserError
from gflowvlm.shared.pictures import decode_pictures
from gflowvlm.shared.prompt_settings import PromptSettings

_ANSWER = "ANSWER"
_PLAIN = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% endif %}{% endfor %}{% endfor %}"
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% if not loop.last or message['role'] == 'system' %}{{ '\n' }}"
    "{% endif %}{% endif %}{% endfor %}{% endfor %}"
)


class PromptInputs:
    """Puts prompts to a model as it was trained to be asked.

    Args:
        model: Model directory or hub name, for messages.
        processor: The transformers processor.
        settings: What the user says of prompts.
    """

    def __init__(self, model: str, processor: Any, settings: PromptSettings) -> None:
        self._model = model
        self._processor = processor
        self._settings = settings

    def render(self, prompt: str, pictures: int = 1) -> str:
        """Returns the text that the processor is given: chat template, picture placeholders, generation prompt.

        A model without a chat template gets `plain_chat_template`.

        Raises:
            UserError: The chat template does not take such a conversation.
        """
        try:
            return self._from_template(self._messages(prompt, pictures), add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            advice = " (try without policy.system_prompt)" if self._settings.system_prompt is not None else ""
            raise UserError(
                f"model {self._model!r}: its chat template does not take a prompt with a picture: {error}{advice}"
            ) from None

    def encode(self, prompts: Sequence[str], images: Sequence[bytes]) -> BatchFeature:
        """Returns left-padded model inputs for prompts with what is shown with each (`shared.pictures`).

        ``input_ids`` and ``attention_mask`` have shape (N, L); pixel tensors are the processor's own.
        """
        pictures = [decode_pictures(image) for image in images]
        inputs = self._processor(
            text=[self.render(prompt, len(shown)) for prompt, shown in zip(prompts, pictures, strict=True)],
            images=pictures,
            padding=True,
            padding_side="left",
            add_special_tokens=self.adds_beginning,
            return_tensors="pt",
        )
        # Some processors think that they are asked for a training example.
        inputs.pop("labels", None)
        return inputs

    @cached_property
    def adds_beginning(self) -> bool:
        """Whether the tokenizer has to put the beginning of the text before a rendered prompt.

        Where the model was trained with one (its tokenizer puts it before every text) and its chat template does not
        write it, as LLaVA's do not.
        """
        tokenizer = self._processor.tokenizer
        beginning = tokenizer.bos_token
        if beginning is None or self.render("").startswith(beginning):
            return False
        alone = tokenizer.encode("a", add_special_tokens=False)
        return bool(tokenizer.encode("a", add_special_tokens=True) == [tokenizer.bos_token_id, *alone])

    def end_of_turn(self) -> str:
        """Returns what the chat template writes behind an answer; nothing where that cannot be told."""
        answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
        try:
            rendered = self._from_template([*self._messages("", 1), answer], add_generation_prompt=False)
        except (TemplateError, TypeError):
            return ""
        _, found, behind = rendered.rpartition(_ANSWER)
        return behind if found else ""

    def _messages(self, prompt: str, pictures: int) -> list[dict[str, Any]]:
        content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self._settings.system_prompt is not None:
            system = [{"type": "text", "text": self._settings.system_prompt}]
            messages.insert(0, {"role": "system", "content": system})
        return messages

    @property
    def has_token_types(self) -> bool:
        """Whether the model is told of each token what it is, and lets tokens of a picture or prompt see each other."""
        return "token_type_ids" in self._processor.model_input_names

    @cached_property
    def plain_chat_template(self) -> str | None:
        """The template of a model that has none, PaliGemma for example: pictures first, then what is said; else None.

        Raises:
            UserError: It is not known how the model writes a picture.
        """
        if getattr(self._processor, "chat_template", None) is not None:
            return None
        placeholder = getattr(self._processor, "image_token", None)
        if placeholder is None:
            raise UserError(
                f"model {self._model!r}: it has neither a chat template nor an image token; save a chat template with "
                "its processor"
            )
        return _PLAIN.replace("PLACEHOLDER", placeholder)

    def _from_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        rendered = self._processor.apply_chat_template(
            messages,
            chat_template=self.plain_chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return str(rendered)


def bound_pictures(processor: Any, settings: PromptSettings, model: str) -> None:
    """Makes a processor keep to the bounds of a picture's size.

    Raises:
        UserError: It has no such bounds.
    """
    pictures: Any = getattr(processor, "image_processor", None)
    known = getattr(getattr(pictures, "valid_kwargs", None), "__annotations__", {})
    for name in settings.pixel_bounds:
        if name not in known:
            raise UserError(
                f"policy.{name}: the pictures of {model!r} are prepared by {type(pictures).__name__}, which has no "
                "such bound; leave it out, and set task.image_size instead"
            )
    # Where there are such bounds, they are what the two edges of the size mean.
    edges = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    for edge, value in edges.items():
        if value is not None:
            setattr(pictures.size, edge, value)
