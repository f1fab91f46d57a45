"""The training loop of supervised fine-tuning, with its checkpoints.

Batches are a function of the step, so a resumed run sees what an uninterrupted one would have seen.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gflowvlm.learner.output_head import OutputHead
from gflowvlm.learner.schedule import rate_to_zero
from gflowvlm.learner.sft import ExampleSource, SftExample, SftSettings, load_for_sft, response_weights, sft_loss
from gflowvlm.learner.sft_weights import load_trained_tensors, trained_tensors, vocabulary, without_adapter
from gflowvlm.shared.answer_formats import DEFAULT_FORMAT
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs

_TRAINED = "trained.safetensors"
"""An adapter's file in a checkpoint, which then holds no model."""


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
        rate = rate_to_zero(self.settings, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        weights = sum(sum(response_weights(self.inputs, e.response, self.settings.content_weight)[1]) for e in examples)
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
