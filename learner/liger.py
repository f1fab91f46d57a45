"""Liger's fused kernel for log-probabilities under a frozen output layer, where it is installed (``liger-kernel``).

It does what `gflowvlm.learner.output_head` does in chunks, with fewer passes over a chunk's logits: on a GPU only, and
only for a plain layer. A bias or a soft cap it would round otherwise than the model does.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def is_available(device: torch.device) -> bool:
    """Whether the kernel is installed and works on such a device."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None


def liger_log_probs(states: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Returns the log-probabilities of tokens, (M,) float32, nats; differentiable in the states.

    Args:
        states: (M, features).
        ids: (M,).
        weight: (vocabulary, features), not trained.
    """
    found: Tensor = _LigerLinear.apply(states, ids, weight)
    return found


class _LigerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        # Its own backward pass would compute the logits again: tokens' gradients are kept apart, and scaled by us.
        losses, *_, gradient, _, _ = fused_linear_cross_entropy_forward(states, weight, ids, reduction="none")
        ctx.save_for_backward(gradient)
        return -losses.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (direction,) = ctx.saved_tensors
        return (-gradient[:, None] * direction).to(direction.dtype), None, None
