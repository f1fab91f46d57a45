"""What a model takes of a device's memory, from its configuration alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from gflowvlm.learner.memory_trace import PassShape, peak_bytes
from gflowvlm.learner.model import DTYPES, adapter_parameters, empty_policy
from gflowvlm.learner.output_head import CHUNK_LOGITS
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.model_sizes import ModelSizes

FLOAT32 = 4

BYTES_IN_FEWER_BITS = {"8bit": 1.0, "4bit": 0.52}
"""Bytes of a weight that bitsandbytes keeps, its scales included."""

ADAM_STATES = 2
"""Numbers that AdamW keeps of each parameter."""

VISION_WIDTHS = 8
"""Copies of a vision block's hidden states that are alive at once, beside twice its feed-forward's."""


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes that one learner holds at the peak of a step.

    Attributes:
        weights: The frozen base model, or this learner's share of it.
        adapter: LoRA's matrices.
        gradients: Theirs.
        optimiser: AdamW's states of them.
        activations: The most that one micro-batch keeps, in the language model or in the vision tower.
        logits: One chunk of the output head's logits, and what is computed with it.
    """

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    logits: int

    @property
    def resident(self) -> int:
        """Bytes that stay between steps."""
        return self.weights + self.adapter + self.optimiser

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.resident + self.gradients + self.activations + self.logits


@dataclass(frozen=True)
class PromptSize:
    """The longest prompt of a task, as a model sees it.

    Attributes:
        tokens: Its tokens, those of the picture included.
        patches: Pieces that the vision tower cuts its picture into.
    """

    tokens: int
    patches: int


class PlannedModel:
    """A model on the meta device, and what is planned of it.

    Attributes:
        sizes: Its sizes.
    """

    def __init__(self, config: RunConfig, model: str | PreTrainedConfig) -> None:
        """Builds the model without its weights; takes seconds for billions of parameters.

        Args:
            config: The run's configuration.
            model: Model directory or hub name, or a model's configuration.

        Raises:
            UserError: No such model, or LoRA targets outside the language model.
        """
        self._config = config
        self._policy = empty_policy(config.policy, model)
        self.sizes = _sizes(self._policy)

    def learner(self, prompt: PromptSize) -> LearnerMemory:
        """Returns what a learner holds whose micro-batches are full of the task's longest prompts and responses.

        Raises:
            UserError: The passes of this model's language model cannot be traced.
        """
        config, sizes = self._config, self.sizes
        shapes = pass_shapes(config, prompt.tokens)
        try:
            text = max(peak_bytes(self._policy, shape) for shape in shapes)
        except ValueError as error:
            raise UserError(f"no memory plan: {error}") from None
        pictures = max(min(shape.states, shape.responses) if shape.shared else shape.responses for shape in shapes)
        device = "cuda" if config.learner.gpus_per_worker > 0 else "cpu"
        most = max(shape.responses * shape.response for shape in shapes)
        parts = config.learner.workers if config.learner.sharding == "fsdp" else 1
        # A divided model's logits are all held at once.
        logits = most * sizes.vocabulary if parts > 1 else min(CHUNK_LOGITS[device], most * sizes.vocabulary)
        adapter = sizes.adapter_parameters * FLOAT32
        element = DTYPES[config.policy.dtype].itemsize
        weights, passing = sizes.weight_bytes // parts + (sizes.block_bytes if parts > 1 else 0), 0
        if config.policy.load_in is not None:
            weights -= int(sizes.linear_parameters * (element - BYTES_IN_FEWER_BITS[config.policy.load_in]))
            # A layer's weights are brought back while it computes.
            passing = sizes.largest_linear * element
        return LearnerMemory(
            weights=weights,
            adapter=adapter,
            gradients=adapter,
            optimiser=ADAM_STATES * adapter,
            activations=passing + max(text, pictures * prompt.patches * sizes.vision_width * element),
            # The logits, their float32 copy, the gradient there and in the weights' precision.
            logits=logits * 2 * (element + FLOAT32),
        )


def pass_shapes(config: RunConfig, prompt: int) -> list[PassShape]:
    """Returns the largest micro-batches of a run: a prompt passed for each response, and shared where it can be.

    Args:
        config: The run's configuration.
        prompt: Tokens of the longest prompt.
    """
    budget, response = config.learner.token_budget, config.policy.max_response_tokens
    rows = max(1, budget // (prompt + response))
    shapes = [PassShape(rows, prompt, rows, response, shared=False)]
    if not config.policy.gradient_checkpointing and config.learner.sharding == "none":
        each = config.rollout.group_size
        states = max(1, budget // (prompt + each * response))
        fitting = max(1, min(each, (budget - prompt) // response))
        shapes.append(PassShape(states, prompt, states * (each if states > 1 else fitting), response, shared=True))
    return shapes


def _sizes(policy: Any) -> ModelSizes:
    base = policy.get_base_model()
    trained = {parameter for _, parameter in adapter_parameters(policy)}
    frozen = [parameter for parameter in policy.parameters() if parameter not in trained]
    text = base.config.get_text_config()
    vision = getattr(base.config, "vision_config", None)
    heads: int = text.num_attention_heads
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kept = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    blocks = int(text.num_hidden_layers)
    decoder = sum(p.numel() * p.element_size() for p in base.get_decoder().parameters() if p not in trained)
    element = frozen[0].element_size()
    head = base.get_output_embeddings()
    linears = [m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear) and m is not head and _is_frozen(m)]
    return ModelSizes(
        parameters=sum(parameter.numel() for parameter in frozen),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in frozen),
        linear_parameters=sum(linears),
        largest_linear=max(linears, default=0),
        adapter_parameters=sum(parameter.numel() for parameter in trained),
        cache_bytes_per_token=2 * blocks * kept * width * element,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        vision_width=0 if vision is None else _vision_width(vision),
        block_bytes=decoder // blocks,
        element_bytes=element,
    )


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


def _vision_width(vision: Any) -> int:
    hidden = int(getattr(vision, "hidden_size", None) or getattr(vision, "embed_dim", None) or 0)
    inside = int(getattr(vision, "intermediate_size", None) or 4 * hidden)
    return VISION_WIDTHS * hidden + 2 * inside
