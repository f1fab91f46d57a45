"""From prompt and image to model inputs: the one way both sampler and learner use.

The sampler and the learner must see the same tokens and pixels, so the chat rendering and the
processor live here and nowhere else.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoProcessor, BatchFeature

from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.response import DONE_TOKEN


@dataclass
class PolicyInputs:
    """A policy's processor, with what the project needs to know of its tokenizer.

    Attributes:
        model: Model directory or hub name, as it was loaded.
        processor: The transformers processor.
    """

    model: str
    processor: Any

    @classmethod
    def load(cls, model: str) -> "PolicyInputs":
        """Loads the processor of a model directory or hub name.

        Raises:
            UserError: No such model, no processor in it, or its tokenizer has no `[DONE]` token.
        """
        path = directory_or_hub_name(model)
        try:
            processor = AutoProcessor.from_pretrained(path)
        except (ImportError, OSError, ValueError) as error:
            if Path(path).is_dir() and not (Path(path) / "config.json").exists():
                raise UserError(
                    f"model {model!r}: no model in that folder (no config.json); if `gflowvlm sft` was stopped there, "
                    "go on with its --resume"
                ) from None
            reason = one_line(error)
            where = "" if Path(path).is_absolute() else "is no folder here, and at the hub "
            raise UserError(f"model {model!r}: {where}its processor cannot be loaded ({reason})") from None
        inputs = cls(path, processor)
        if inputs.done_id is None:
            raise UserError(
                f"model {model!r}: its tokenizer has no single token {DONE_TOKEN!r}; "
                "make one that has with `gflowvlm sft --model MODEL --out DIR`"
            )
        return inputs

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @cached_property
    def done_id(self) -> int | None:
        """Token id of `[DONE]`, or None when the tokenizer does not have it as one token."""
        ids = self.tokenizer.encode(DONE_TOKEN, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            return None
        return int(ids[0])

    @cached_property
    def end_id(self) -> int:
        """Token id that ends a response."""
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def forbidden_ids(self) -> list[int]:
        """Special tokens that must not be sampled inside a response: all but `[DONE]` and the end token."""
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special = added | set(self.tokenizer.all_special_ids)
        return sorted(special - {self.done_id, self.end_id})

    def render(self, prompt: str) -> str:
        """Returns the prompt as the model expects it: chat template, image placeholder, generation prompt."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def encode(self, prompts: Sequence[str], images: Sequence[bytes]) -> BatchFeature:
        """Returns left-padded model inputs for prompts with one encoded image each.

        ``input_ids`` and ``attention_mask`` have shape (N, L); pixel tensors are the processor's own.
        """
        return self.processor(
            text=[self.render(prompt) for prompt in prompts],
            images=[[decode_image(image)] for image in images],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of response tokens, `[DONE]` kept, a last end token dropped."""
        ids = list(token_ids)
        if ids and ids[-1] == self.end_id:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def encode_response(self, text: str) -> list[int]:
        """Returns the tokens of a demonstration's response, end token last."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end_id]


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


def decode_image(image: bytes) -> Image.Image:
    """Returns an encoded image as an RGB picture."""
    return Image.open(io.BytesIO(image)).convert("RGB")
