"""Prompts as vLLM's engine takes them, made once for all rollouts that stand before the same state."""

import asyncio
import hashlib
import time
from typing import Any

from gflowvlm.actors.sampling import PromptTooLongError
from gflowvlm.shared.pictures import decode_pictures
from gflowvlm.shared.policy_inputs import PolicyInputs

CACHE_GIB = 0.25
"""Rendered prompts kept, least recently used dropped first. The K rollouts of a group begin in the same state."""

_LENGTH_PARAMETERS = ("input_text", "input_tokens")
"""What vLLM calls the prompt where it finds it too long before the picture's tokens are in it."""


class RenderedPrompts:
    """Renders prompts with vLLM's own renderer, and remembers them.

    Rendering decodes the picture, tokenises the text, runs the image processor and puts the picture's tokens in
    place: 40 % of a replica's time with a tiny policy (docs/benchmarks.md).
    """

    def __init__(self, inputs: PolicyInputs, renderer: Any, longest: int) -> None:
        """Makes an empty cache.

        Args:
            inputs: The policy's chat template.
            renderer: The renderer of the `AsyncLLM` that takes what `rendered` returns.
            longest: Prompt and response of the model at most, tokens.
        """
        from vllm.multimodal.cache.base import MultiModalCache

        self._inputs = inputs
        self._renderer = renderer
        self._longest = longest
        # As the learner's encoding: most chat templates have written every special token.
        self._tokenization = renderer.default_cmpl_tok_params.with_kwargs(add_special_tokens=inputs.adds_beginning)
        self._cache: Any = MultiModalCache.get_lru_cache(CACHE_GIB, dict)
        # The renderer works in one thread: who waits here would wait there, and finds the prompt rendered.
        self._rendering = asyncio.Lock()

    async def rendered(self, prompt: str, image: bytes) -> dict[str, Any]:
        """Returns a prompt and its encoded picture as `AsyncLLM.generate` takes them.

        Raises:
            PromptTooLongError: The prompt leaves no room for a response.
            VLLMClientError: The engine refuses it for another reason.
        """
        picture = hashlib.sha256(image).hexdigest()
        key = f"{picture} {prompt}"
        found = self._cache.get(key)
        if found is None:
            async with self._rendering:
                found = self._cache.get(key)
                if found is None:
                    found = await self._render(prompt, image, picture)
                    self._cache[key] = found
        return {**found, "arrival_time": time.time()}

    async def _render(self, prompt: str, image: bytes, picture: str) -> dict[str, Any]:
        pictures = decode_pictures(image)
        raw = {
            "prompt": self._inputs.render(prompt, len(pictures)),
            "multi_modal_data": {"image": pictures},
            # Names the pictures in vLLM's caches; without it every pixel of the decoded ones is hashed.
            "multi_modal_uuids": {"image": [f"{picture}-{number}" for number in range(len(pictures))]},
        }
        from vllm.exceptions import VLLMValidationError

        try:
            # vLLM's usual image cache leaves out the pixels that its engine has seen; what is kept here must have them.
            (rendered,) = await self._renderer.render_cmpl_async([raw], self._tokenization, skip_mm_cache=True)
        except VLLMValidationError as error:
            if error.parameter in _LENGTH_PARAMETERS:
                # vLLM stops counting at the limit.
                raise PromptTooLongError.of(None, self._longest) from None
            raise
        tokens = len(rendered["prompt_token_ids"])
        if tokens >= self._longest:
            raise PromptTooLongError.of(tokens, self._longest)
        return dict(rendered)
