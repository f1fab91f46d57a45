"""Supervised fine-tuning: token cross-entropy on demonstrated responses (the paper's SFT baseline).

All parameters are trained, the vocabulary's matrices only where that is asked for.

Weights are in float32 while they are trained, in bfloat16 too: there, most updates would be rounded away. That takes 16
bytes for each with gradients and AdamW's moments; an adapter takes next to none beside the model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from gflowvlm.learner.continuation import Continuation
from gflowvlm.learner.output_head import OutputHead
from gflowvlm.learner.sft_weights import (
    freeze_vocabulary,
    with_adapter,
    with_done_token,
    without_adapter,
)
from gflowvlm.shared.answer_formats import DEFAULT_FORMAT, answer_format
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.hub import require_at_hub
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.precision import Precision
from gflowvlm.shared.prompt_inputs import bound_pictures
from gflowvlm.shared.prompt_settings import PromptSettings

_CHECKED_STEPS = 16
"""First steps whose demonstrations are looked at before training."""

IGNORED = -100
"""Label of positions that carry no loss."""

_REMEMBERED_RESPONSES = 4096
"""Responses whose tokens are remembered: demonstrations come again, and the learner waits for them."""


class SftSettings(PromptSettings):
    """Supervised fine-tuning; prompts are put to the model as a run's ``policy`` of the same settings puts them."""

    steps: int = Field(1500, ge=1, le=10_000_000)
    batch_size: int = Field(32, ge=1, le=65_536, description="Examples in one optimiser step.")
    micro_batch: int = Field(8, ge=1, le=65_536, description="Examples in one forward pass.")
    learning_rate: float = Field(3e-3, gt=0, le=1, description="Peak; a cosine takes it to 0.")
    warmup_steps: int = Field(50, ge=0)
    content_weight: float = Field(
        5.0, gt=0, le=1000, description="Weight of the tokens of an answer's values; others 1."
    )
    weight_decay: float = Field(0.01, ge=0, le=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.98, ge=0, lt=1)
    grad_clip: float = Field(1.0, gt=0, le=1e6)
    dtype: Precision = Field(
        "float32",
        description="What the model computes in and is saved in; while it is trained, its weights are float32.",
    )
    train_embeddings: bool = Field(
        True, description="Train input embeddings and output head too; without, `[DONE]`'s rows alone, if it has any."
    )
    lora_rank: int = Field(
        0,
        ge=0,
        le=512,
        description="Train an adapter of this rank beside weights in `dtype`, merged at the end; 0: all.",
    )
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    seed: int = Field(0, ge=0, lt=2**31)


@dataclass(frozen=True)
class SftExample:
    """One demonstrated response.

    Attributes:
        prompt: The task's prompt, before any chat template.
        image: The encoded picture.
        response: The response's text, without an end token.
    """

    prompt: str
    image: bytes
    response: str


class ExampleSource(Protocol):
    """Where examples come from."""

    def batch(self, step: int, size: int) -> Sequence[SftExample]:
        """Returns the examples of a step; the same ones at every call."""


def load_for_sft(
    model: str, settings: SftSettings, answers: str = DEFAULT_FORMAT, done_token: bool = False
) -> tuple[Any, PolicyInputs]:
    """Loads a model and its processor.

    Args:
        model: Model directory or hub name.
        settings: Precision and gradient checkpointing.
        answers: Name of the answer format that is taught.
        done_token: Whether `[DONE]` is made one token of both where it is none.

    Returns:
        The model in training mode and its inputs.

    Raises:
        UserError: The model or its processor cannot be loaded.
    """
    require_at_hub(model)
    # Bars for reading and writing local files would stand in the middle of our own; downloads keep theirs.
    transformers_logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(model)
        dtype = torch.float32 if settings.lora_rank == 0 else getattr(torch, settings.dtype)
        network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        reason = one_line(error)
        raise UserError(f"model {model!r}: cannot be loaded ({reason})") from None
    bound_pictures(processor, settings, model)
    inputs = PolicyInputs(model, processor, answer_format(answers), settings)
    if done_token and inputs.done_id is None:
        inputs = with_done_token(network, inputs)
    if settings.lora_rank > 0:
        network = with_adapter(network, settings.lora_rank, settings.dtype, settings.seed, inputs.done_id)
    elif not settings.train_embeddings:
        freeze_vocabulary(network, inputs.done_id)
    if settings.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        network.config.use_cache = False
    return network.to("cuda" if torch.cuda.is_available() else "cpu").train(), inputs


def sft_loss(
    network: Any,
    inputs: PolicyInputs,
    examples: Sequence[SftExample],
    content_weight: float,
    precision: Precision = "float32",
    head: OutputHead | None = None,
) -> Tensor:
    """Returns the weighted sum of token cross-entropies over the responses and the sum of the weights.

    Args:
        network: The model.
        inputs: Its processor.
        examples: N examples.
        content_weight: Weight of tokens that overlap a value of the answer; others, the end token among them, weigh 1.
        precision: What the model computes in, whatever its weights are in.
        head: The model's output head, which may compute in chunks; by default all logits are held at once.

    Returns:
        Tensor of shape (2,), float32: the weighted sum (nats) and the sum of weights.
    """
    batch = inputs.encode([e.prompt for e in examples], [e.image for e in examples]).to(network.device, network.dtype)
    tokens, weights = _pad_right([response_weights(inputs, e.response, content_weight) for e in examples])
    tokens, weights = tokens.to(network.device), weights.to(network.device)
    present = tokens != IGNORED
    columns = tokens.shape[1] + 1
    model_inputs = Continuation(without_adapter(network)).whole(dict(batch), tokens.clamp(min=0), present)
    head = OutputHead(without_adapter(network)) if head is None else head
    with torch.autocast(network.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        states, _ = head.passed(lambda: network(**model_inputs, use_cache=False, logits_to_keep=columns).logits)
        # One column earlier predicts the first response token; the last predicts nothing.
        log_probs = head.log_probs(states[:, -columns:-1][present], tokens[present])
    return torch.stack([-(log_probs * weights[present]).sum(), weights.sum()])


def check_demonstrations(source: ExampleSource, inputs: PolicyInputs, settings: SftSettings) -> None:
    """Makes sure, before any training, that what is demonstrated can be learned and read.

    Args:
        source: The demonstrations; those of the first steps are looked at.
        inputs: The tokenizer and the answer format.
        settings: How many there are.

    Raises:
        UserError: A demonstration does not come back from its tokens, or holds no action that can be read.
    """
    for step in range(min(_CHECKED_STEPS, settings.steps)):
        for example in source.batch(step, settings.batch_size):
            if inputs.read(inputs.encode_response(example.response)).parsed.malformed:
                raise UserError(
                    f"no action is read out of the demonstration {example.response!r}; is it in another answer format "
                    "than task.answer_format?"
                )


@lru_cache(maxsize=_REMEMBERED_RESPONSES)
def response_weights(inputs: PolicyInputs, text: str, content_weight: float) -> tuple[list[int], list[float]]:
    """Returns a response's tokens, end token last, and their weights."""
    ids = inputs.encode_response(text)
    content = inputs.answer_format.content_chars(text)
    weights = [
        content_weight if any(start < right and left < end for left, right in content) else 1.0
        for start, end in inputs.characters(ids)
    ]
    return ids, weights


def _pad_right(rows: Sequence[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    """Returns tokens (N, L), padded with `IGNORED`, and weights (N, L), padded with 0."""
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), length), IGNORED)
    weights = torch.zeros(len(rows), length)
    for row, (ids, values) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(values)] = torch.tensor(values)
    return tokens, weights
