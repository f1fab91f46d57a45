"""From last hidden states to log-probabilities of chosen tokens, without the logits of all columns at once.

Logits of N responses of R tokens over a vocabulary of 152,000 are gigabytes, several times over with what their
gradient needs. What is wanted of them is one number for each token. So a model's pass ends at its output layer, which
is given one column only, and the rest is done here, a chunk of tokens after the other.

A log-probability depends on its own hidden state alone. Where the output layer is frozen, the direction
d log p / d hidden is computed together with log p, while the chunk's logits are there; the backward pass then only
scales it. That takes as many matrix products as keeping all logits would, and as much memory as the hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from gflowvlm.learner.liger import is_available as liger_is_available
from gflowvlm.learner.liger import liger_log_probs

log = logging.getLogger(__name__)

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}
"""Logits computed at once, by the type of device: few enough to be small, many enough for the device to be busy."""

PROBE_RANGE = (-60.0, 50.0)
"""Values of the output layer between which a model is asked what it does with them; their mean is not 0, either."""

PROBE_TOKENS = 8
"""Tokens on which Liger's kernel is compared at the start."""


@dataclass(frozen=True)
class LogitMap:
    """What a model does with the output layer's values: ``cap · tanh(multiplier · x / divisor / cap)``.

    Attributes:
        multiplier: Cohere's ``logit_scale``.
        divisor: Granite's ``logits_scaling``.
        cap: Gemma's ``final_logit_softcapping``; None for none.
    """

    multiplier: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Returns the logits, in the values' precision and with the model's own operations."""
        if self.multiplier != 1.0:
            values = values * self.multiplier
        if self.divisor != 1.0:
            values = values / self.divisor
        if self.cap is not None:
            values = torch.tanh(values / self.cap) * self.cap
        return values

    def scale_gradient(self, gradient: Tensor, logits: Tensor) -> None:
        """Turns a gradient of the logits into one of the output layer's values, in place."""
        if self.cap is not None:
            gradient.mul_(1.0 - (logits / self.cap).square_())
        if self.multiplier != 1.0 or self.divisor != 1.0:
            gradient.mul_(self.multiplier / self.divisor)


class OutputHead:
    """A model's output layer and what its forward pass does behind it.

    Args:
        model: The model, without an adapter's wrapper.
    """

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings()
        self.layer: nn.Module | None = layer if isinstance(layer, nn.Module) else None
        self._candidates = _logit_maps(model.config)
        self._map: LogitMap | None = None
        self._vocabulary = 0
        self._uses_liger = False
        self._name = type(model).__name__

    @property
    def _is_sharded(self) -> bool:
        return self.layer is not None and isinstance(self.layer.weight, DTensor)

    @property
    def in_chunks(self) -> bool:
        """Whether `log_probs` takes hidden states, as after `observe`; it takes the model's logits otherwise."""
        return self._map is not None

    def passed(self, logits_of_a_pass: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Passes something through the model.

        In chunks the output layer itself is given a single state, so that the pass has next to no logits.

        Args:
            logits_of_a_pass: Passes it and returns the model's logits.

        Returns:
            What `log_probs` takes of every column for which the model computes logits, (N, columns, features or
            vocabulary); and the output layer's input, (N, columns, features), None where the model shows no such layer.
        """
        captured: list[Tensor] = []

        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            captured.append(args[0])
            return (args[0][:1, -1:], *args[1:]) if self.in_chunks else None

        if self.layer is None:
            return logits_of_a_pass(), None
        hook = self.layer.register_forward_pre_hook(capture)
        try:
            logits = logits_of_a_pass()
        finally:
            hook.remove()
        hidden = captured[-1] if captured else None
        if hidden is None or not self.in_chunks:
            return logits, hidden
        if self._is_sharded:
            # A divided model's backward pass begins where its pass ended: there it gathers its last layers again.
            hidden = hidden + 0.0 * logits.sum().to(hidden.dtype)
        return hidden, hidden

    def observe(self, logits_of_a_pass: Callable[[], Tensor]) -> None:
        """Finds out what the model does behind its output layer, and computes in chunks from then on.

        In the pass the layer's values are replaced by known ones from −60 to 50, at which a soft cap cannot be mistaken
        for none. Where the logits are none of what is known here, the model's own are taken, and a line says so.

        Args:
            logits_of_a_pass: Passes any short input through the model and returns its logits.
        """
        if self.layer is None:
            return
        probes: list[Tensor] = []

        def replace(_: nn.Module, __: tuple[Tensor, ...], values: Tensor) -> Tensor:
            row = torch.linspace(*PROBE_RANGE, values.shape[-1], device=values.device)
            probes.append(row.to(values.dtype).expand_as(values))
            return probes[-1]

        hook = self.layer.register_forward_hook(replace)
        try:
            with torch.no_grad():
                logits = logits_of_a_pass()
        finally:
            hook.remove()
        if len(probes) == 1 and probes[0].shape == logits.shape:
            self._vocabulary = logits.shape[-1]
            fitting = (m for m in self._candidates if torch.allclose(m(probes[0]), logits, rtol=1e-6, atol=1e-6))
            self._map = next(fitting, None)
        if self._map is None:
            log.warning(
                "%s does something of its own with the values of its output layer: a micro-batch's logits are all held "
                "at once (a smaller learner.token_budget takes less memory)",
                self._name,
            )
        self._uses_liger = self._liger_agrees()

    def log_probs(self, states: Tensor, ids: Tensor) -> Tensor:
        """Returns the log-probability of one token behind each state: (M,) float32, nats; differentiable.

        Args:
            states: (M, features) inputs of the output layer if `in_chunks`, (M, vocabulary) logits otherwise.
            ids: (M,) the tokens.
        """
        if self._map is None or self.layer is None:
            return log_probs_of(states, ids)
        if isinstance(self.layer, nn.Linear) and _is_frozen_linear(self.layer):
            weight, bias = _whole_tensor(self.layer.weight), _whole_tensor(self.layer.bias)
            assert weight is not None
            if self._uses_liger:
                return liger_log_probs(states, ids, weight)
            return frozen_log_probs(states, ids, weight, bias, self._map)
        return _through_layer(self.layer, self._map, states, ids, chunk_rows(states.device, self._vocabulary))

    def _liger_agrees(self) -> bool:
        """Whether Liger's kernel is to be used: it is there, it fits, and it gives the same numbers and gradients."""
        layer = self.layer
        if not isinstance(layer, nn.Linear) or not _is_frozen_linear(layer) or layer.bias is not None:
            return False
        if self._map != LogitMap() or not liger_is_available(layer.weight.device):
            return False
        weight = _whole_tensor(layer.weight)
        assert weight is not None
        ids = torch.arange(PROBE_TOKENS, device=weight.device) % self._vocabulary
        found = []
        for compute in (
            liger_log_probs,
            lambda states, ids, weight: frozen_log_probs(states, ids, weight, None, LogitMap()),
        ):
            states = weight[ids].detach().clone().requires_grad_()
            # Another token than the one that the state speaks for, so that the gradient is not 0.
            log_probs = compute(states, ids.roll(1), weight)
            (gradient,) = torch.autograd.grad(log_probs.sum(), states)
            found.append((log_probs.detach(), gradient.float()))
        bounds = {"atol": 1e-4, "rtol": 1e-4} if weight.dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        agrees = all(torch.allclose(one, other, **bounds) for one, other in zip(*found, strict=True))
        if not agrees:
            log.warning("liger-kernel gives other log-probabilities of %s and is not used", self._name)
        return agrees


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Returns how many tokens' logits are computed at once."""
    return max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cpu"]) // vocabulary)


def _logit_maps(config: Any) -> list[LogitMap]:
    """Returns what a model may do behind its output layer by its configuration, which some classes of models ignore."""
    text = config.get_text_config()
    multiplier = getattr(text, "logit_scale", None)
    divisor = getattr(text, "logits_scaling", None)
    cap = getattr(text, "final_logit_softcapping", None)
    maps = [LogitMap()]
    if multiplier is not None:
        maps.append(LogitMap(multiplier=float(multiplier)))
    if divisor is not None:
        maps.append(LogitMap(divisor=float(divisor)))
    return maps + ([] if cap is None else [LogitMap(m.multiplier, m.divisor, float(cap)) for m in maps])


def _whole_tensor(tensor: Tensor | None) -> Tensor | None:
    """Returns a tensor, gathered from all ranks where it is divided among them; then all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _is_frozen_linear(layer: nn.Linear) -> bool:
    # A class derived from it may hold its weights otherwise, or add to them.
    return type(layer) is nn.Linear and not any(parameter.requires_grad for parameter in layer.parameters())


def log_probs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns the log-probabilities (M,) float32 of tokens (M,) under logits (M, vocabulary), nats."""
    logits = logits.float()
    return logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def frozen_log_probs(states: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap) -> Tensor:
    """Returns the log-probabilities of tokens under a linear layer that is not trained, in chunks; differentiable.

    Args:
        states: (M, features).
        ids: (M,).
        weight: (vocabulary, features).
        bias: (vocabulary,), or None.
        logit_map: What follows the layer.

    Returns:
        (M,) float32, nats.
    """
    rows = chunk_rows(states.device, weight.shape[0])
    found: Tensor = _FrozenLinear.apply(states, ids, weight, bias, logit_map, rows)
    return found


class _FrozenLinear(torch.autograd.Function):
    """Log-probabilities under a linear layer that is not trained itself."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap, rows: int
    ) -> Tensor:
        wants_direction = ctx.needs_input_grad[0]
        if torch.is_autocast_enabled(states.device.type):
            # Once, not for every chunk.
            weight = weight.to(torch.get_autocast_dtype(states.device.type))
        found = torch.empty(len(ids), dtype=torch.float32, device=states.device)
        direction = torch.empty_like(states) if wants_direction else None
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            logits = logit_map(nn.functional.linear(states[part], weight, bias)).float()
            log_norm = logits.logsumexp(dim=1)
            wanted = ids[part, None]
            found[part] = logits.gather(1, wanted).squeeze(1) - log_norm
            if direction is not None:
                # d log p / d logits is 1 at the token less the probabilities.
                gradient = (logits - log_norm[:, None]).exp_().neg_()
                gradient.scatter_add_(1, wanted, torch.ones_like(wanted, dtype=gradient.dtype))
                logit_map.scale_gradient(gradient, logits)
                direction[part] = gradient.to(weight.dtype) @ weight
        if direction is not None:
            ctx.save_for_backward(direction)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (direction,) = ctx.saved_tensors
        return (gradient[:, None] * direction).to(direction.dtype), None, None, None, None, None


def _through_layer(layer: nn.Module, logit_map: LogitMap, states: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The same through any layer, trained or not; a chunk's logits are computed again in the backward pass."""

    def log_probs(states: Tensor, ids: Tensor) -> Tensor:
        return log_probs_of(logit_map(layer(states)), ids)

    if len(ids) <= rows:
        return log_probs(states, ids)
    parts = [
        checkpoint(log_probs, states[start : start + rows], ids[start : start + rows], use_reentrant=False)
        for start in range(0, len(ids), rows)
    ]
    return torch.cat(parts)
