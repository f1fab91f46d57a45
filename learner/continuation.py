"""A model's inputs for a response behind its prompt: token types, positions and the like, by the model's own rules."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


class Continuation:
    """Extends the inputs of prompts by those of responses.

    Args:
        model: The model, without an adapter's wrapper.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        core = getattr(model, "model", model)
        # Models whose positions have several axes (Qwen-VL) know them from the pictures' sizes.
        self._axes = getattr(core, "get_rope_index", None)

    def prompt_positions(self, inputs: dict[str, Any]) -> Tensor | None:
        """Returns the positions of left-padded prompts' tokens, (N, L) or (axes, N, L).

        As in the sampler, which has no padding: the first real token stands at 0.

        Returns:
            None where the inputs lack what the model's rule takes, and the model has to find them itself.
        """
        if self._axes is None:
            return (inputs["attention_mask"].long().cumsum(dim=1) - 1).clamp(min=0)
        taken = inspect.signature(self._axes).parameters
        required = {name for name, p in taken.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        if not required <= inputs.keys():
            return None
        positions: Tensor = self._axes(**{name: value for name, value in inputs.items() if name in taken})[0]
        return positions

    def response_positions(self, prompt_positions: Tensor, width: int) -> Tensor:
        """Returns the positions of the `width` tokens behind prompts: text, which goes on by 1 on every axis."""
        last = prompt_positions[..., -1:]
        return last + torch.arange(1, width + 1, device=last.device)

    def whole(self, inputs: dict[str, Any], responses: Tensor, mask: Tensor) -> dict[str, Any]:
        """Returns the inputs of prompts with their responses.

        Args:
            inputs: The prompts', left-padded; per-token ones of shape (N, L, ...).
            responses: (N, R) tokens, right-padded.
            mask: (N, R), False in the padding.
        """
        positions = self.prompt_positions(inputs)
        width = responses.shape[1]
        extended = inputs | {
            "input_ids": torch.cat([inputs["input_ids"], responses], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], dim=1),
        }
        for name, (values, of_response) in self._per_token(inputs).items():
            extended[name] = torch.cat([values, of_response.expand(-1, width, *of_response.shape[2:])], dim=1)
        if positions is not None:
            extended["position_ids"] = torch.cat([positions, self.response_positions(positions, width)], dim=-1)
        return extended

    def _per_token(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns further inputs of one value for each token with their value for a response's token, (N, 1, ...).

        What a token type means differs: to PaliGemma 0 is the prompt, which sees all of itself, and 1 what follows; to
        Gemma 3 1 is a picture. The model's rule for a generated token is asked for a single one, and holds for all.
        """
        shape = inputs["input_ids"].shape
        ours = ("input_ids", "attention_mask")
        found = {
            name: value
            for name, value in inputs.items()
            if name not in ours and isinstance(value, Tensor) and value.shape[:2] == shape
        }
        if not found:
            return {}
        # Transformers has no public name for this rule, but every class of models that has one of its own puts it here.
        longer = self._model._update_model_kwargs_for_generation(ModelOutput(), dict(found), is_encoder_decoder=False)
        return {
            name: (
                value,
                longer[name][:, shape[1] :] if longer[name].shape[1] > shape[1] else torch.zeros_like(value[:, :1]),
            )
            for name, value in found.items()
        }
