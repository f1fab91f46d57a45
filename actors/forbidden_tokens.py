"""Tokens that vLLM must never sample, where they are more than it takes logit biases for."""

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

_KEY = "forbidden_token_ids"


def forbidding_arguments(token_ids: list[int]) -> dict[str, Any]:
    """Returns engine arguments with which an engine samples none of these tokens, in any request."""
    processor = f"{ForbiddenTokens.__module__}:{ForbiddenTokens.__qualname__}"
    return {"logits_processors": [processor], "additional_config": {_KEY: token_ids}}


class ForbiddenTokens(LogitsProcessor):
    """Masks the same tokens in every request: no work for a request, whatever their number.

    Of the first model runner's interface, which `gflowvlm.actors.vllm_arguments` chooses with it.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        token_ids = vllm_config.additional_config[_KEY]
        self._token_ids = torch.tensor(token_ids, dtype=torch.long, device=device)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Has nothing to check in a request."""

    def is_argmax_invariant(self) -> bool:
        """A forbidden token may be the likeliest one."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Has no state."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the logits (N, vocabulary) with the forbidden ones at minus infinity."""
        return logits.index_fill_(1, self._token_ids, float("-inf"))
