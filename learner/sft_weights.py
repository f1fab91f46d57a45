"""Which weights supervised fine-tuning trains: all, all but the vocabulary's, or an adapter; and how they begin."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AddedToken

from gflowvlm.learner.model import adapted
from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.precision import Precision
from gflowvlm.shared.response import DONE_TOKEN


def vocabulary(network: Any) -> list[Any]:
    """Returns the weights of the input embedding and the output head, which may be one tensor."""
    layers = (network.get_input_embeddings(), network.get_output_embeddings())
    return [layer.weight for layer in layers if layer is not None]


def freeze_vocabulary(network: Any, trained_row: int | None) -> None:
    """Freezes the vocabulary's matrices but for one row, whose gradient alone is let through."""
    for weight in set(vocabulary(network)):
        if trained_row is None:
            weight.requires_grad_(False)
        else:
            weight.register_hook(partial(_only_row, trained_row))


def with_adapter(network: Any, rank: int, dtype: Precision, seed: int, trained_row: int | None) -> Any:
    """Returns the model with a LoRA adapter, its scale twice the rank, that alone is trained.

    Args:
        network: The model.
        rank: The adapter's.
        dtype: What the model is in; the adapter is in float32.
        seed: Of the adapter's initialisation.
        trained_row: A row of the vocabulary's matrices that is trained too, or None.
    """
    rows: dict[str, list[int]] = {}
    if trained_row is not None:
        weights = vocabulary(network)
        rows = {
            name.rpartition(".")[0]: [trained_row]
            for name, parameter in network.named_parameters()
            if any(parameter is weight for weight in weights)
        }
    settings = PolicySettings(lora_rank=rank, lora_alpha=2.0 * rank, dtype=dtype)
    return adapted(network, settings, seed, rows)


def without_adapter(network: Any) -> Any:
    """Returns the model inside an adapter's wrapper; any other as it is."""
    return network.get_base_model() if isinstance(network, PeftModel) else network


def trained_tensors(network: Any) -> dict[str, Tensor]:
    """Returns what is trained, by name."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def load_trained_tensors(network: Any, tensors: dict[str, Tensor]) -> None:
    """Restores what `trained_tensors` returned.

    Raises:
        ValueError: They are of another model or adapter.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in trained.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError("its adapter is of another model")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


def with_done_token(network: Any, inputs: PolicyInputs) -> PolicyInputs:
    """Adds `[DONE]` to tokenizer and embeddings; its rows start as the mean of those that wrote it until then.

    The mean of all rows is nearly 0 where a vocabulary is large and was pretrained, and far from what a short training
    reaches: the token is then demonstrated and never played.
    """
    written = inputs.tokenizer.encode(DONE_TOKEN, add_special_tokens=False)
    # A token that is normalised is found in some tokenizers at the beginning of a text only. Not a special one:
    # decoding that skips those keeps the action.
    inputs.tokenizer.add_tokens([AddedToken(DONE_TOKEN, normalized=False, special=False)])
    made = replace(inputs)
    if made.done_id is None:
        raise UserError(f"model {inputs.model!r}: its tokenizer cannot hold {DONE_TOKEN!r} as one token")
    # Some embeddings have spare rows past the tokenizer's last token; never cut those off.
    if made.done_id >= network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(made.done_id + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
            layer.weight[made.done_id] = layer.weight[written].float().mean(dim=0).to(layer.weight.dtype)
    return made


def scale_head(network: Any, factor: float) -> None:
    """Multiplies the output head, and so every logit, by a factor.

    Training that follows brings the probabilities that demonstrations show back to where they belong; what
    stays is that tokens never demonstrated are exponentially less likely. A tiny model needs it: the noise
    that reinforcement puts into its weights otherwise turns some responses malformed.

    Raises:
        UserError: The head shares its weights with the input embedding.
    """
    head = network.get_output_embeddings()
    if head is None or head.weight is network.get_input_embeddings().weight:
        raise UserError("--head-scale: this model's output head is its input embedding and cannot be scaled alone")
    with torch.no_grad():
        head.weight.mul_(factor)


def _only_row(row: int, gradient: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[row] = gradient[row]
    return kept
