"""Supervised fine-tuning: token cross-entropy on demonstrated responses (the paper's SFT baseline).

All parameters are trained, the vocabulary's matrices only where that is asked for. Batches are a function of the step,
so a resumed run sees what an uninterrupted one would have seen.

Weights are in float32 while they are trained, in bfloat16 too: there, most updates would be rounded away. That takes 16
bytes for each with gradients and AdamW's moments; an adapter takes next to none beside the model's own.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from gflowvlm.learner.continuation import Continuation
from gflowvlm.learner.output_head import OutputHead
from gflowvlm.learner.sft_weights import (
    freeze_vocabulary,
    load_trained_tensors,
    trained_tensors,
    vocabulary,
    with_adapter,
    with_done_token,
    without_adapter,
)
from gflowvlm.shared.answer_formats import DEFAULT_FORMAT, answer_format
from gflowvlm.shared.config import Precision
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.prompt_inputs import bound_pictures
from gflowvlm.shared.prompt_settings import PromptSettings

_TRAINED = "trained.safetensors"
"""An adapter's file in a checkpoint, which then holds no model."""

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


@dataclass(frozen=True)
class SftProgress:
    """One optimiser step.

    Attributes:
        step: Steps done.
        loss: Weighted mean of token cross-entropies, nats.
        learning_rate: Of this step.
        grad_norm: Before clipping.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float


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
    tokens, weights = _pad_right([_response(inputs, e.response, content_weight) for e in examples])
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


class SftTrainer:
    """Trains a model on demonstrated responses, step by step, with checkpoints.

    Attributes:
        network: The model.
        inputs: Its processor.
        settings: The settings.
        step: Optimiser steps done.
        trained: How many numbers are trained.
    """

    def __init__(self, network: Any, inputs: PolicyInputs, settings: SftSettings) -> None:
        self.network = network
        self.inputs = inputs
        self.settings = settings
        self.step = 0
        self._head: OutputHead | None = None
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        # Decay would move the rows of a vocabulary that are not trained.
        masked = not settings.train_embeddings and settings.lora_rank == 0
        undecayed = {p for p in vocabulary(network) if p.requires_grad} if masked else set()
        self.trained = sum(p.shape[1] if p in undecayed else p.numel() for p in self._parameters)
        decays = {True: 0.0, False: settings.weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._parameters if (p in undecayed) == is_undecayed], "weight_decay": decay}
            for is_undecayed, decay in decays.items()
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2)
        )

    @classmethod
    def resume(cls, checkpoint: Path, settings: SftSettings, answers: str = DEFAULT_FORMAT) -> "SftTrainer":
        """Continues from a checkpoint, in the same answer format.

        Raises:
            UserError: There is no checkpoint, it is damaged, or other settings made it.
        """
        try:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(checkpoint / "optimizer.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{checkpoint}: no readable checkpoint to resume from ({error})") from None
        made_with = state.get("settings")
        changed = [k for k, v in settings.model_dump(mode="json").items() if not made_with or made_with.get(k) != v]
        if changed:
            raise UserError(f"{checkpoint}: was made with another {changed[0]}; resume with the same settings")
        if settings.lora_rank == 0:
            network, inputs = load_for_sft(str(checkpoint), settings, answers)
        else:
            network, inputs = load_for_sft(state["base"], settings, answers, state["done_token"])
            try:
                load_trained_tensors(network, load_file(checkpoint / _TRAINED))
            except (OSError, ValueError, SafetensorError) as error:
                raise UserError(f"{checkpoint}: no readable checkpoint to resume from ({error})") from None
        trainer = cls(network, inputs, settings)
        trainer._load_optimizer(tensors, checkpoint)
        trainer.step = int(state["step"])
        return trainer

    def train(
        self,
        source: ExampleSource,
        checkpoint: Path,
        on_step: Callable[[SftProgress], None],
        stop: Callable[[], bool],
    ) -> bool:
        """Trains to the last step, or until asked to stop; writes checkpoints on the way and when stopped.

        Args:
            source: The examples.
            checkpoint: Folder of the newest checkpoint.
            on_step: Called after each step.
            stop: Asked before each step.

        Returns:
            Whether the last step was reached.
        """
        while self.step < self.settings.steps:
            if stop():
                self.save_checkpoint(checkpoint)
                return False
            progress = self._update(source.batch(self.step, self.settings.batch_size))
            on_step(progress)
            if self.step % self.settings.checkpoint_every == 0 and self.step < self.settings.steps:
                self.save_checkpoint(checkpoint)
        return True

    def round_weights(self) -> None:
        """Brings the trained weights to the precision that the model computes in, and is saved in; not an adapter's."""
        if self.settings.lora_rank == 0:
            self.network.to(getattr(torch, self.settings.dtype))

    def save_model(self, directory: Path) -> None:
        """Writes the trained model, its weights rounded, its adapter merged, and its processor; ends the training."""
        self.round_weights()
        if self.settings.lora_rank > 0:
            self.network = self.network.merge_and_unload()
        self._write_model(directory)

    def save_checkpoint(self, checkpoint: Path) -> None:
        """Writes model, optimiser and step; an older checkpoint stands until the new one is whole."""
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        state: dict[str, Any] = {"step": self.step, "settings": self.settings.model_dump(mode="json")}
        if self.settings.lora_rank == 0:
            self._write_model(partial)
        else:
            partial.mkdir(parents=True)
            save_file(trained_tensors(self.network), partial / _TRAINED)
            state |= {"base": self.inputs.model, "done_token": self.inputs.done_id is not None}
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, parameter in enumerate(self._parameters)
            for name, value in self._optimizer.state[parameter].items()
        }
        save_file(tensors, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)

    def drop_checkpoint(self, checkpoint: Path) -> None:
        """Removes the checkpoint of a training that is done."""
        shutil.rmtree(checkpoint, ignore_errors=True)

    def _write_model(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.network.save_pretrained(directory)
        self.inputs.processor.save_pretrained(directory)

    def _update(self, examples: Sequence[SftExample]) -> SftProgress:
        rate = learning_rate(self.step, self.settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        weights = sum(sum(_response(self.inputs, e.response, self.settings.content_weight)[1]) for e in examples)
        loss = 0.0
        self._optimizer.zero_grad(set_to_none=True)
        # Examples of similar length share a forward pass: less padding.
        examples = sorted(examples, key=lambda e: len(e.prompt))
        for first in range(0, len(examples), self.settings.micro_batch):
            part = examples[first : first + self.settings.micro_batch]
            total = self._loss(part) / weights
            total.backward()
            loss += float(total.detach())
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.grad_clip)
        self._optimizer.step()
        self.step += 1
        return SftProgress(self.step, loss, rate, float(norm))

    def _loss(self, examples: Sequence[SftExample]) -> Tensor:
        """Returns the weighted sum of cross-entropies."""
        if self._head is None:
            first = self.inputs.encode([examples[0].prompt], [examples[0].image])
            first = first.to(self.network.device, self.network.dtype)
            self._head = OutputHead(without_adapter(self.network))
            self._head.observe(lambda: self.network(**first, use_cache=False, logits_to_keep=1).logits)
        settings = self.settings
        return sft_loss(self.network, self.inputs, examples, settings.content_weight, settings.dtype, self._head)[0]

    def _load_optimizer(self, tensors: dict[str, Tensor], checkpoint: Path) -> None:
        for index, parameter in enumerate(self._parameters):
            names = [name for name in tensors if name.startswith(f"{index}.")]
            state = {name.partition(".")[2]: tensors[name] for name in names}
            if state and state["exp_avg"].shape != parameter.shape:
                raise UserError(f"{checkpoint}: its optimiser state does not fit its model; start again")
            self._optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
            }


class Schedule(Protocol):
    """How a learning rate goes: `warmup_steps` of a linear rise to its peak, then a cosine to 0 at `steps`."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""

    @property
    def warmup_steps(self) -> int:
        """First steps, over which the rate rises."""

    @property
    def learning_rate(self) -> float:
        """The peak."""


def learning_rate(step: int, settings: Schedule) -> float:
    """Returns the learning rate of a step (counted from 0): linear warm-up, then a cosine to 0."""
    warm = min(settings.warmup_steps, settings.steps - 1)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


@lru_cache(maxsize=_REMEMBERED_RESPONSES)
def _response(inputs: PolicyInputs, text: str, content_weight: float) -> tuple[list[int], list[float]]:
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
