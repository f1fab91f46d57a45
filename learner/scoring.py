"""Log-probabilities of the sampler's exact response tokens: log P_Act, log P_CoT and log P(⊤).

One forward pass gives all of them (GFlowVLM eq. 2-5). A micro-batch (`gflowvlm.learner.packing`) is left-padded prompts
followed by right-padded responses, so that all responses start in the same column and only their logits are
computed. The column before is the last prompt token: its last hidden state, which the output layer is given anyway,
stands for the state z_t.

A group's trajectories meet in the same states, the first one at least. Where the model allows it, such a prompt and
picture are passed once, and the responses continue from the keys and values that it left.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.packing import MicroBatch, Packer, ScoredStep
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs

LOG_ACT, LOG_COT, LOG_STOP, LOG_REST = range(4)
"""Columns of `StepScores.stacked`."""

FILLER_IMAGE = (64, 64)
"""Size of a filler's picture, pixels; a processor scales it to what its model takes."""


@dataclass(frozen=True)
class StepScores:
    """Scores of N steps, float32, nats.

    Attributes:
        log_act: (N,) log P_Act: the sum over the action's tokens; 0 when malformed.
        log_cot: (N,) log P_CoT: the sum over the tokens before the action; all tokens when malformed.
        log_stop: (N,) log P(⊤), the sum over `ScoredStep.stop_ids` behind the same chain of thought; 0 without them.
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
        self._sharded_over = sharded_over
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._output_layer = base.get_output_embeddings()
        # Models with multi-axis rotary positions (Qwen-VL) derive them from ids and mask themselves.
        core = getattr(base, "model", base)
        self._takes_positions = not hasattr(core, "get_rope_index")
        # Sharded, all ranks must make as many passes, whatever their steps have in common.
        shares = self._takes_positions and sharded_over is None and _keeps_all_keys(base)
        self._packer = Packer(inputs, token_budget, shares_prompts=shares)
        pad = inputs.tokenizer.pad_token_id
        self._pad_id = inputs.end_id if pad is None else int(pad)

    def pack(self, steps: Sequence[ScoredStep]) -> list[MicroBatch]:
        """Returns the steps in micro-batches; see `Packer.pack`."""
        return self._packer.pack(steps)

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
        """Scores a micro-batch, each state passed once; differentiable where gradients are enabled.

        Args:
            batch: The steps.
            with_hidden: Whether to give the hidden states of the prompts' last tokens too (`hidden_size`).
        """
        responses, mask = self._responses(batch)
        width = responses.shape[1]
        pass_through = self._continued if len(batch.states) < len(batch.steps) else self._whole
        logits, hidden = pass_through(batch, responses, mask, with_hidden)
        logits = logits.float()
        log_norm = logits.logsumexp(dim=-1)
        tokens = logits.gather(2, responses[:, :, None]).squeeze(2) - log_norm
        tokens = torch.where(mask, tokens, 0.0)

        column = torch.arange(width, device=self._device)
        cot_end = torch.tensor([step.cot_end for step in batch.steps], device=self._device)
        action_end = torch.tensor([step.action_end for step in batch.steps], device=self._device)
        in_cot = column < cot_end[:, None]
        in_action = (column >= cot_end[:, None]) & (column < action_end[:, None])
        row = torch.arange(len(batch.steps), device=self._device)
        inside = [_stop_is_inside(step) for step in batch.steps]
        last = torch.tensor([step.cot_end + len(step.stop_ids) - 1 for step in batch.steps], device=self._device)
        stop_token = torch.tensor([[*step.stop_ids, 0][len(step.stop_ids) - 1] for step in batch.steps])
        at = last.clamp(min=0, max=width - 1)
        stop = logits[row, at, stop_token.to(self._device)] - log_norm[row, at]
        stop = stop + torch.where((column >= cot_end[:, None]) & (column < last[:, None]), tokens, 0.0).sum(dim=1)
        stop = torch.where(torch.tensor(inside, device=self._device), stop, 0.0)
        return StepScores(
            log_act=torch.where(in_action, tokens, 0.0).sum(dim=1),
            log_cot=torch.where(in_cot, tokens, 0.0).sum(dim=1),
            log_stop=stop + self._stops_outside(batch),
            log_rest=torch.where(column >= action_end[:, None], tokens, 0.0).sum(dim=1),
            token_log_probs=tokens.detach(),
            hidden=hidden,
        )

    def _stops_outside(self, batch: MicroBatch) -> Tensor:
        """Returns (N,) log P(⊤) of the steps whose stop begins with other tokens than their action; 0 of others."""
        log_stop = torch.zeros(len(batch.steps), device=self._device)
        rows = [n for n, step in enumerate(batch.steps) if len(step.stop_ids) > 0 and not _stop_is_inside(step)]
        if len(rows) == 0:
            return log_stop
        steps = [_stopping(batch.steps[n]) for n in rows]
        scores = self.score_steps(MicroBatch([], steps, steps, list(range(len(steps)))))
        return log_stop.index_add(0, torch.tensor(rows, device=self._device), scores.log_act)

    def _whole(
        self, batch: MicroBatch, responses: Tensor, mask: Tensor, with_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Passes every prompt with its response: logits (N, R, vocabulary) of the response's tokens, hidden states."""
        inputs, width = self._prompts(batch), responses.shape[1]
        shape = inputs["input_ids"].shape
        for name, tensor in inputs.items():
            if name == "input_ids":
                inputs[name] = torch.cat([tensor, responses], dim=1)
            elif name == "attention_mask":
                inputs[name] = torch.cat([tensor, mask.to(tensor.dtype)], dim=1)
            elif tensor.shape == shape:
                # Further per-token inputs (token types): a response is plain text, type 0.
                inputs[name] = torch.cat([tensor, tensor.new_zeros(responses.shape)], dim=1)
        if self._takes_positions:
            inputs["position_ids"] = _positions(inputs["attention_mask"])
        logits, hidden = self._passed(inputs, width + 1, with_hidden, use_cache=False)
        # The column before a token predicts it, so the last column predicts nothing we have.
        return logits[:, :-1], hidden

    def _continued(
        self, batch: MicroBatch, responses: Tensor, mask: Tensor, with_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same as `_whole`; each state is passed once, and its responses continue it."""
        state_of = torch.tensor(batch.state_of, device=self._device)
        inputs = self._prompts(batch)
        prompt_mask = inputs["attention_mask"]
        cache = DynamicCache()
        inputs |= {"position_ids": _positions(prompt_mask), "past_key_values": cache}
        first, hidden = self._passed(inputs, 1, with_hidden, use_cache=True)
        first, hidden = first[state_of], None if hidden is None else hidden[state_of]
        if responses.shape[1] == 1:
            return first, hidden
        cache.batch_select_indices(state_of)
        attention = torch.cat([prompt_mask[state_of], mask[:, :-1].to(prompt_mask.dtype)], dim=1)
        later = self._policy(
            input_ids=responses[:, :-1],
            attention_mask=attention,
            position_ids=_positions(attention)[:, prompt_mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).logits
        return torch.cat([first, later], dim=1), hidden

    def _passed(
        self, inputs: dict[str, Any], columns: int, with_hidden: bool, use_cache: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the logits of the last columns, and the last hidden states in the first of them where asked for."""
        kept = {"logits_to_keep": columns} if self._keeps_logits else {}
        with self._captured_hidden(-columns, with_hidden) as captured:
            logits = self._policy(**inputs, use_cache=use_cache, **kept).logits[:, -columns:]
        return logits, captured[-1] if with_hidden else None

    def _filler(self) -> MicroBatch:
        """Returns a micro-batch of one short step of no trajectory."""
        picture = io.BytesIO()
        Image.new("RGB", FILLER_IMAGE).save(picture, "PNG")
        step = ScoredStep("", picture.getvalue(), [self._inputs.end_id], cot_end=0, action_end=1)
        return MicroBatch([], [step], [step], [0])

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

    def _responses(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Returns the padded responses (N, R) and their mask (N, R)."""
        width = max(1, *(len(step.response_ids) for step in batch.steps))
        responses = torch.full((len(batch.steps), width), self._pad_id)
        for row, step in enumerate(batch.steps):
            responses[row, : len(step.response_ids)] = torch.tensor(step.response_ids, dtype=torch.long)
        lengths = torch.tensor([len(step.response_ids) for step in batch.steps])
        return responses.to(self._device), (torch.arange(width) < lengths[:, None]).to(self._device)

    def _prompts(self, batch: MicroBatch) -> dict[str, Any]:
        """Returns the model's inputs for the states' prompts and images."""
        if batch.encoded is None:
            encoded = self._inputs.encode([s.prompt for s in batch.states], [s.image for s in batch.states])
            batch.encoded = dict(encoded)
        return {
            name: (tensor.to(self._policy.dtype) if tensor.is_floating_point() else tensor).to(self._device)
            for name, tensor in batch.encoded.items()
        }


def _stop_is_inside(step: ScoredStep) -> bool:
    """Whether a response's own pass scores its stop: all but the last of the stop's tokens are the response's."""
    shared = step.stop_ids[:-1]
    return len(step.stop_ids) > 0 and list(step.response_ids[step.cot_end : step.cot_end + len(shared)]) == list(shared)


def _stopping(step: ScoredStep) -> ScoredStep:
    """Returns the step with its stop as the action."""
    ids = [*step.response_ids[: step.cot_end], *step.stop_ids]
    return ScoredStep(step.prompt, step.image, ids, step.cot_end, len(ids))


def _keeps_all_keys(model: Any) -> bool:
    """Whether a pass leaves the keys and values of all its tokens behind, for others to continue from.

    Not with gradient checkpointing, for which transformers leaves them out, and not with sliding windows or states.
    """
    layers = DynamicCache(config=model.config).layers
    return not model.is_gradient_checkpointing and all(type(layer) is DynamicLayer for layer in layers)


def _positions(attention_mask: Tensor) -> Tensor:
    """Returns positions as in the sampler, which has no padding: the first real token stands at 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
