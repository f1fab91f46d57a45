"""The loss of supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowvlm.learner.losses.output import LossOutput


def cross_entropy(*, log_prob: Tensor, tokens: Tensor, chosen: Tensor) -> LossOutput:
    """Mean cross-entropy of a token: −Σ log p / Σ tokens over the chosen responses, nats.

    Args:
        log_prob: (S,) log-probability of each whole response; the others may hold anything.
        tokens: (S,) tokens of each response.
        chosen: (S,) bool, the responses to imitate.

    Returns:
        The loss, an exact 0 where no response is chosen; `token_log_prob`: its negative.
    """
    total = torch.where(chosen, log_prob, 0.0).sum()
    loss = -total / torch.where(chosen, tokens, 0).sum().clamp(min=1)
    return LossOutput(loss, {"token_log_prob": -loss.detach()})
