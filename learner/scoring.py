"""Log-probabilities of the sampler's exact response tokens: log P_Act, log P_CoT and log P(⊤).

One forward pass gives all of them (GFlowVLM eq. 2-5). Steps are packed by length into micro-batches of a
bounded number of padded tokens; a micro-batch is the left-padded prompts followed by the right-padded
responses, so that all responses start in the same column and only their logits are computed. The column before
is the last prompt token: its last hidden state, which the output layer is given anyway, stands for the state z_t.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from learner.distributed import Ranks
from shared.errors import UserError
from shared.policy_inputs import PolicyInputs
from shared.trajectory import Step, Trajectory

LOG_ACT, LOG_COT, LOG_STOP, LOG_REST = range(4)
"""Columns of `StepScores.stacked`."""

FILLER_IMAGE = (64, 64)
"""Size of a filler's picture, pixels; a processor scales it to what its model takes."""


@dataclass(frozen=True)
class ScoredStep:
    """One response to score.

    Attributes:
        prompt: The task's prompt, before the chat template.
        image: The encoded image.
        response_ids: The exact response tokens.
        cot_end: Tokens ``[0, cot_end)`` are chain of thought.
        action_end: Tokens ``[cot_end, action_end)`` are the action; empty when malformed.
    """

    prompt: str
    image: bytes
    response_ids: Sequence[int]
    cot_end: int
    action_end: int


@dataclass
class MicroBatch:
    """Steps that are scored together.

    Attributes:
        index: Where the steps stand in the list that was packed; empty for a filler (`Scorer.in_step`).
        steps: The steps.
        encoded: Model inputs of prompts and images, made at the first use (the processor is called once,
            however many passes follow).
    """

    index: list[int]
    steps: list[ScoredStep]
    encoded: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def is_filler(self) -> bool:
        """Whether it is passed only because other ranks pass one, and its scores mean nothing."""
        return len(self.index) == 0


@dataclass(frozen=True)
class StepScores:
    """Scores of N steps, float32, nats.

    Attributes:
        log_act: (N,) log P_Act: the sum over the action's tokens; 0 when malformed.
        log_cot: (N,) log P_CoT: the sum over the tokens before the action; all tokens when malformed.
        log_stop: (N,) log P([DONE]) at the action's first position; 0 when malformed (there is none).
        log_rest: (N,) the sum over the tokens after the action; 0 when malformed.
        token_log_probs: (N, R) log-probability of each response token, detached; 0 in the padding.
        hidden: (N, features) last hidden state of the prompt's last token, in the model's precision; None
            where it was not asked for.
    """

    log_act: Tensor
    log_cot: Tensor
    log_stop: Tensor
    log_rest: Tensor
    token_log_probs: Tensor
    hidden: Tensor | None

    def stacked(self) -> Tensor:
        """(N, 4): log_act, log_cot, log_stop, log_rest."""
        return torch.stack([self.log_act, self.log_cot, self.log_stop, self.log_rest], dim=1)


def steps_of(trajectories: Iterable[Trajectory]) -> list[ScoredStep]:
    """Returns the steps of all trajectories, one after the other."""
    return [scored_step(t, step) for t in trajectories for step in t.steps]


def scored_step(trajectory: Trajectory, step: Step) -> ScoredStep:
    """Returns what is needed to score a step of a trajectory."""
    image = trajectory.images[step.image]
    return ScoredStep(step.prompt, image, step.response_ids, step.cot_end, step.action_end)


class Scorer:
    """Scores steps under a policy.

    Args:
        policy: The model (with or without adapter), in evaluation mode.
        inputs: Its processor.
        device: Where the model lives.
        token_budget: Most padded tokens in a micro-batch; a single longer step is a micro-batch of its own.
        sharded_over: The ranks that the model is divided among (`learner.sharding`), or None.
    """

    def __init__(
        self,
        policy: Any,
        inputs: PolicyInputs,
        device: torch.device,
        token_budget: int,
        sharded_over: Ranks | None = None,
    ) -> None:
        self._policy = policy
        self._inputs = inputs
        self._device = device
        self._budget = token_budget
        self._sharded_over = sharded_over
        self._image_tokens: dict[tuple[int, int], int] = {}
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._output_layer = base.get_output_embeddings()
        # Models with multi-axis rotary positions (Qwen-VL) derive them from ids and mask themselves.
        core = getattr(base, "model", base)
        self._takes_positions = not hasattr(core, "get_rope_index")
        pad = inputs.tokenizer.pad_token_id
        self._pad_id = inputs.end_id if pad is None else int(pad)

    def pack(self, steps: Sequence[ScoredStep]) -> list[MicroBatch]:
        """Returns the steps in micro-batches: similar lengths together, the longest first."""
        prompts = self._prompt_lengths(steps)
        responses = [max(1, len(step.response_ids)) for step in steps]
        order = sorted(range(len(steps)), key=lambda i: (prompts[i] + responses[i], responses[i], i), reverse=True)
        groups: list[list[int]] = []
        widest_prompt = widest_response = 0
        for i in order:
            prompt, response = max(widest_prompt, prompts[i]), max(widest_response, responses[i])
            if groups and (len(groups[-1]) + 1) * (prompt + response) <= self._budget:
                groups[-1].append(i)
                widest_prompt, widest_response = prompt, response
            else:
                groups.append([i])
                widest_prompt, widest_response = prompts[i], responses[i]
        return [MicroBatch(group, [steps[i] for i in group]) for group in groups]

    def in_step(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Returns the micro-batches that this rank must pass so that every rank makes as many passes.

        Where the model is sharded, all ranks must call this, and the rank that has fewer gets fillers behind its
        own. Where it is not, they are returned as they are.
        """
        ranks = self._sharded_over
        if ranks is None:
            return list(batches)
        most = int(ranks.max(torch.tensor(float(len(batches)), dtype=torch.float64)))
        return [*batches, *(self._filler() for _ in range(most - len(batches)))]

    def hidden_size(self) -> int:
        """Returns the width of the hidden states that `score_steps` gives.

        Raises:
            UserError: The model's output layer cannot be found.
        """
        if not isinstance(self._output_layer, nn.Module):
            raise UserError(
                f"objective.loss: {type(self._policy).__name__} shows no output layer to read hidden states from; "
                "choose a loss without a learned log Z or flow (var_tb, db, subtb)"
            )
        weight = self._output_layer.get_parameter("weight")
        return int(weight.shape[-1])

    def score_steps(self, batch: MicroBatch, with_hidden: bool = False) -> StepScores:
        """Scores a micro-batch in one forward pass; differentiable where gradients are enabled.

        Args:
            batch: The steps.
            with_hidden: Whether to give the hidden states of the prompts' last tokens too (`hidden_size`).
        """
        inputs, responses, mask = self._model_inputs(batch)
        width = responses.shape[1]
        kept = {"logits_to_keep": width + 1} if self._keeps_logits else {}
        with self._captured_hidden(-(width + 1), with_hidden) as captured:
            logits = self._policy(**inputs, use_cache=False, **kept).logits[:, -(width + 1) :]
        # The column before a token predicts it, so the last column predicts nothing we have.
        logits = logits[:, :-1].float()
        log_norm = logits.logsumexp(dim=-1)
        tokens = logits.gather(2, responses[:, :, None]).squeeze(2) - log_norm
        tokens = torch.where(mask, tokens, 0.0)

        column = torch.arange(width, device=self._device)
        cot_end = torch.tensor([step.cot_end for step in batch.steps], device=self._device)
        action_end = torch.tensor([step.action_end for step in batch.steps], device=self._device)
        in_cot = column < cot_end[:, None]
        in_action = (column >= cot_end[:, None]) & (column < action_end[:, None])
        row = torch.arange(len(batch.steps), device=self._device)
        first = cot_end.clamp(max=width - 1)
        stop = logits[row, first, self._inputs.done_id] - log_norm[row, first]
        return StepScores(
            log_act=torch.where(in_action, tokens, 0.0).sum(dim=1),
            log_cot=torch.where(in_cot, tokens, 0.0).sum(dim=1),
            log_stop=torch.where(action_end > cot_end, stop, 0.0),
            log_rest=torch.where(column >= action_end[:, None], tokens, 0.0).sum(dim=1),
            token_log_probs=tokens.detach(),
            hidden=captured[-1] if with_hidden else None,
        )

    def _filler(self) -> MicroBatch:
        """Returns a micro-batch of one short step of no trajectory."""
        picture = io.BytesIO()
        Image.new("RGB", FILLER_IMAGE).save(picture, "PNG")
        step = ScoredStep("", picture.getvalue(), [self._inputs.end_id], cot_end=0, action_end=1)
        return MicroBatch([], [step])

    @contextmanager
    def _captured_hidden(self, column: int, active: bool) -> Iterator[list[Tensor]]:
        """Yields a list to which a forward pass adds the output layer's input in one column.

        Every class of models has that layer, whatever its outputs are called, and with `logits_to_keep` its
        input begins with just this column. `output_hidden_states` would keep all layers' states.
        """
        captured: list[Tensor] = []
        if not active:
            yield captured
            return
        hook = self._output_layer.register_forward_pre_hook(lambda _, args: captured.append(args[0][:, column]))
        try:
            yield captured
        finally:
            hook.remove()

    def _model_inputs(self, batch: MicroBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Returns the model's inputs, the padded responses (N, R) and their mask (N, R)."""
        if batch.encoded is None:
            encoded = self._inputs.encode([s.prompt for s in batch.steps], [s.image for s in batch.steps])
            batch.encoded = dict(encoded)
        width = max(1, *(len(step.response_ids) for step in batch.steps))
        responses = torch.full((len(batch.steps), width), self._pad_id)
        for row, step in enumerate(batch.steps):
            responses[row, : len(step.response_ids)] = torch.tensor(step.response_ids, dtype=torch.long)
        lengths = torch.tensor([len(step.response_ids) for step in batch.steps])
        mask = torch.arange(width) < lengths[:, None]

        prompt_shape = batch.encoded["input_ids"].shape
        inputs = {}
        for name, tensor in batch.encoded.items():
            if name == "input_ids":
                tensor = torch.cat([tensor, responses], dim=1)
            elif name == "attention_mask":
                tensor = torch.cat([tensor, mask.to(tensor.dtype)], dim=1)
            elif tensor.shape == prompt_shape:
                # Further per-token inputs (token types): a response is plain text, type 0.
                tensor = torch.cat([tensor, tensor.new_zeros(responses.shape)], dim=1)
            elif tensor.is_floating_point():
                tensor = tensor.to(self._policy.dtype)
            inputs[name] = tensor.to(self._device)
        if self._takes_positions:
            # As in the sampler, which has no padding: the first real token stands at position 0.
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(dim=1) - 1).clamp(min=0)
        return inputs, responses.to(self._device), mask.to(self._device)

    def _prompt_lengths(self, steps: Sequence[ScoredStep]) -> list[int]:
        """Returns the prompts' lengths in tokens, without processing every image.

        The placeholder of an image expands to a number of tokens that depends on its size only; it is
        measured once per size. (A processor for which that were wrong would only make a micro-batch larger.)
        """
        if len(steps) == 0:
            return []
        texts = [self._inputs.render(step.prompt) for step in steps]
        lengths = [len(ids) for ids in self._inputs.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for i, step in enumerate(steps):
            size = image_size(step.image)
            if size not in self._image_tokens:
                full = self._inputs.encode([step.prompt], [step.image])["input_ids"].shape[1]
                self._image_tokens[size] = int(full) - lengths[i]
            lengths[i] += self._image_tokens[size]
        return lengths


def image_size(image: bytes) -> tuple[int, int]:
    """Returns width and height of an encoded image, pixels, without decoding it."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.size
