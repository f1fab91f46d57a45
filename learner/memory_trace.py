"""How much memory a pass through a language model takes, from its shapes alone.

The pass and its gradient are made with fake tensors, which have shapes and precisions and no numbers: every allocation
is counted as it is made and given back, so that a model's own ways (what PEFT casts, what attention keeps, what is
computed again under gradient checkpointing) count as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

TRACED_LAYERS = (2, 4)
"""Layers that are traced of a deeper model; what each further one takes is their difference."""


@dataclass(frozen=True)
class PassShape:
    """Sizes of one micro-batch.

    Attributes:
        states: Prompts that are passed.
        prompt: Tokens of each, its pictures included.
        responses: Responses.
        response: Tokens of each.
        shared: Whether the responses continue the prompts' keys and values; otherwise every response is passed with
            a prompt of its own.
    """

    states: int
    prompt: int
    responses: int
    response: int
    shared: bool

    @property
    def tokens(self) -> int:
        """Padded tokens that are passed."""
        return self.states * self.prompt + self.responses * self.response


def peak_bytes(policy: Any, shape: PassShape) -> int:
    """Returns the most bytes that a pass through the policy's language model and back holds at once.

    Weights, and the gradients of the adapter, are not among them.

    Args:
        policy: What `gflowvlm.learner.model.empty_policy` returns; it is left as it is.
        shape: Sizes of the micro-batch.

    Raises:
        ValueError: The language model cannot be traced: it takes other inputs than most do.
    """
    decoder = policy.get_base_model().get_decoder()
    layers = _layers(decoder)
    few, more = TRACED_LAYERS
    try:
        if layers is None or len(layers) <= more:
            return _traced(decoder, shape)
        with _cut_to(decoder, layers, few):
            least = _traced(decoder, shape)
        with _cut_to(decoder, layers, more):
            each = max(0, _traced(decoder, shape) - least) // (more - few)
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{type(decoder).__name__} cannot be traced ({error})") from error
    return least + (len(layers) - few) * each


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it while they are alive."""

    def __init__(self, weights: nn.Module) -> None:
        super().__init__()
        self._known = WeakIdKeyDictionary()
        self._now = self.peak = 0
        for tensor in (*weights.parameters(), *weights.buffers()):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = True
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self._now -= size


def pass_bytes(decoder: nn.Module, shape: PassShape) -> int:
    """Makes a pass through a language model and back; returns what `peak_bytes` does, counted as it was allocated."""
    live = _LiveBytes(decoder)
    with live:
        passed = _passed(decoder, shape)
        torch.autograd.backward(passed, [torch.ones_like(states) for states in passed])
    gradients = sum(p.numel() * p.element_size() for p in decoder.parameters() if p.requires_grad)
    return max(0, live.peak - gradients)


def _traced(decoder: nn.Module, shape: PassShape) -> int:
    with FakeTensorMode(), _fake_weights(decoder):
        return pass_bytes(decoder, shape)


def _passed(decoder: Any, shape: PassShape) -> list[Tensor]:
    """Returns last hidden states; as `gflowvlm.learner.scoring` makes them."""
    if not shape.shared:
        length = shape.prompt + shape.response
        inputs = _inputs(decoder, shape.responses, length, length)
        return [decoder(**inputs, use_cache=False).last_hidden_state]
    cache, each = DynamicCache(), shape.responses // shape.states
    prompts = _inputs(decoder, shape.states, shape.prompt, shape.prompt)
    first = decoder(**prompts, past_key_values=cache, use_cache=True).last_hidden_state
    cache.batch_select_indices(torch.arange(shape.states * each) // each)
    responses = _inputs(decoder, shape.states * each, shape.response, shape.prompt + shape.response)
    later = decoder(**responses, past_key_values=cache, use_cache=True).last_hidden_state
    return [first, later]


def _inputs(decoder: Any, rows: int, tokens: int, seen: int) -> dict[str, Tensor]:
    weight = next(decoder.parameters())
    positions = torch.arange(seen - tokens, seen)[None].expand(rows, tokens)
    return {
        "inputs_embeds": torch.empty(rows, tokens, decoder.config.get_text_config().hidden_size, dtype=weight.dtype),
        "attention_mask": torch.ones(rows, 1, tokens, seen, dtype=torch.bool),
        "position_ids": positions,
    }


@contextmanager
def _fake_weights(module: nn.Module) -> Iterator[None]:
    """Puts fake tensors on the CPU in place of a module's, which are on the meta device; for use in a fake mode."""
    kept = []
    for part in module.modules():
        kept.append((part, dict(part.named_parameters(recurse=False)), dict(part.named_buffers(recurse=False))))
    try:
        for part, parameters, buffers in kept:
            for name, old in parameters.items():
                fake = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                part.register_parameter(name, fake)
            for name, buffer in buffers.items():
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        yield
    finally:
        for part, parameters, buffers in kept:
            for name, old in parameters.items():
                part.register_parameter(name, old)
            for name, buffer in buffers.items():
                setattr(part, name, buffer)


def _layers(decoder: nn.Module) -> nn.ModuleList | None:
    """Returns the decoder's own transformer blocks, None where they are not kept as most models do."""
    found = getattr(decoder, "layers", None)
    if isinstance(found, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in found):
        return found
    return None


@contextmanager
def _cut_to(decoder: Any, layers: nn.ModuleList, count: int) -> Iterator[None]:
    decoder.layers = layers[:count]
    try:
        yield
    finally:
        decoder.layers = layers
