"""Log-probabilities of the sampler's exact response tokens: log P_Act, log P_CoT and log P(⊤).

One forward pass gives all of them (GFlowVLM eq. 2-5). A micro-batch (`gflowvlm.learner.packing`) is left-padded prompts
followed by right-padded responses, so that all responses start in the same column. The hidden states of these columns
become log-probabilities of the tokens (`gflowvlm.learner.output_head`). The column before them is the last prompt
token, whose hidden state stands for the state z_t.

A group's trajectories meet in the same states, the first one at least. Where the model allows it, such a prompt and
picture are passed once, and the responses continue from the keys and values that it left.

log P(⊤) takes one more entry, in the column at which the response could have stopped, where the stop begins as the
response goes on. Where it does not, chain of thought and stop are a row of their own behind the same prompt.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gflowvlm.learner.continuation import Continuation
from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.output_head import OutputHead
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
        log_stop: (N,) log P(⊤) behind the chain of thought: the sum over the stop's tokens; 0 where there is none
            (`ScoredStep.has_stop`), or where the response is not the stop and stops were not asked for.
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
        with_stops: Whether log P(⊤) is needed at every state, or only where it was played.
    """

    def __init__(
        self,
        policy: Any,
        inputs: PolicyInputs,
        device: torch.device,
        token_budget: int,
        sharded_over: Ranks | None = None,
        with_stops: bool = True,
    ) -> None:
        self._policy = policy
        self._inputs = inputs
        self._device = device
        self._sharded_over = sharded_over
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._with_stops = with_stops
        self._head = OutputHead(base)
        self._continuation = Continuation(base)
        pad = inputs.tokenizer.pad_token_id
        self._pad_id = inputs.end_id if pad is None else int(pad)

        filler = self._prompts(self._filler())
        self._head.observe(lambda: self._pass(filler, 1, use_cache=False))
        # Sharded, all ranks must make as many passes, whatever their steps have in common.
        shares = sharded_over is None and _keeps_all_keys(base)
        shares = shares and self._continuation.prompt_positions(filler) is not None
        self._packer = Packer(inputs, token_budget, shares_prompts=shares, with_stops=with_stops)

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
        if self._head.layer is None:
            raise UserError(
                f"objective.loss: {type(self._policy).__name__} shows no output layer to read hidden states from; "
                "choose a loss without a learned log Z or flow (var_tb, db, subtb)"
            )
        weight = self._head.layer.get_parameter("weight")
        return int(weight.shape[-1])

    def score_steps(self, batch: MicroBatch, with_hidden: bool = False, with_stops: bool = True) -> StepScores:
        """Scores a micro-batch, each state passed once; differentiable where gradients are enabled.

        Args:
            batch: The steps.
            with_hidden: Whether to give the hidden states of the prompts' last tokens too (`hidden_size`).
            with_stops: False leaves log P(⊤) out where it was not played, though the scorer is made for it.
        """
        with_stops = with_stops and self._with_stops
        count = len(batch.steps)
        # A model that passes prompts and responses together passes every prompt that was encoded.
        stops = batch.stops if with_stops or not batch.is_shared else []
        responses, mask = self._rows([*(step.response_ids for step in batch.steps), *(stop.ids for stop in stops)])
        column = torch.arange(responses.shape[1], device=self._device)
        starts = torch.tensor([*([0] * count), *(stop.start for stop in stops)], device=self._device)
        states, hidden = (self._continued if batch.is_shared else self._whole)(batch, responses, mask, with_hidden)

        wanted = mask & (column >= starts[:, None])
        rows, columns = wanted.nonzero(as_tuple=True)
        ids = responses[rows, columns]
        ends = _stop_ends(batch, with_stops)
        if ends:
            row, at, token = (torch.tensor(values, device=self._device) for values in zip(*ends, strict=True))
            rows, columns, ids = torch.cat([rows, row]), torch.cat([columns, at]), torch.cat([ids, token])
        log_probs = self._head.log_probs(states[rows, columns], ids)
        all_tokens = torch.zeros(responses.shape, device=self._device)
        first_end = len(rows) - len(ends)
        all_tokens = all_tokens.index_put((rows[:first_end], columns[:first_end]), log_probs[:first_end])
        tokens = all_tokens[:count]

        cot_end = torch.tensor([step.cot_end for step in batch.steps], device=self._device)
        action_end = torch.tensor([step.action_end for step in batch.steps], device=self._device)
        in_cot = column < cot_end[:, None]
        in_action = (column >= cot_end[:, None]) & (column < action_end[:, None])
        return StepScores(
            log_act=torch.where(in_action, tokens, 0.0).sum(dim=1),
            log_cot=torch.where(in_cot, tokens, 0.0).sum(dim=1),
            log_stop=self._log_stop(batch, all_tokens, log_probs[first_end:], ends),
            log_rest=torch.where(column >= action_end[:, None], tokens, 0.0).sum(dim=1),
            token_log_probs=tokens.detach(),
            hidden=hidden,
        )

    def _log_stop(self, batch: MicroBatch, tokens: Tensor, last: Tensor, ends: list[tuple[int, int, int]]) -> Tensor:
        """Returns (N,) log P(⊤): from the tokens of a response or of the stop's own row, and from entries of their own.

        Args:
            batch: The steps.
            tokens: (N + stops, R) log-probabilities of all rows' tokens.
            last: Log-probabilities of the stops' last tokens that no row holds.
            ends: Where these are; see `_stop_ends`.
        """
        count, own_rows = len(batch.steps), tokens.shape[0] > len(batch.steps)
        has_end = {row for row, _, _ in ends}
        row, start, stop = list(range(count)), [0] * count, [0] * count
        for n, step in enumerate(batch.steps):
            at, own = step.stop_column, batch.stop_of[n] if batch.stop_of else None
            if at is not None and n in has_end:
                start[n], stop[n] = step.cot_end, at
            elif at is not None and step.response_ids[at] == step.stop_ids[-1]:
                start[n], stop[n] = step.cot_end, at + 1
            elif own is not None and own_rows:
                row[n], start[n], stop[n] = count + own, step.cot_end, tokens.shape[1]
        column = torch.arange(tokens.shape[1], device=self._device)
        first, behind = (torch.tensor(values, device=self._device)[:, None] for values in (start, stop))
        inside = (column >= first) & (column < behind)
        log_stop = torch.where(inside, tokens[row], 0.0).sum(dim=1)
        if ends:
            log_stop = log_stop.index_add(0, torch.tensor([n for n, _, _ in ends], device=self._device), last)
        return log_stop

    def _whole(
        self, batch: MicroBatch, responses: Tensor, mask: Tensor, with_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Passes every prompt with its response.

        Returns:
            What `OutputHead.log_probs` takes, (N, R, features or vocabulary): in a token's column what predicts it;
            and the hidden states (N, features) of the prompts' last tokens.
        """
        inputs = self._continuation.whole(self._prompts(batch), responses, mask)
        states, hidden = self._passed(inputs, responses.shape[1] + 1, with_hidden, use_cache=False)
        # The column before a token predicts it, so the last column predicts nothing we have.
        return states[:, :-1], None if hidden is None else hidden[: len(batch.steps)]

    def _continued(
        self, batch: MicroBatch, responses: Tensor, mask: Tensor, with_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same as `_whole`; each state is passed once, and its responses continue it."""
        state_of = torch.tensor(batch.state_of[: len(responses)], device=self._device)
        inputs = self._prompts(batch)
        prompt_mask = inputs["attention_mask"]
        positions = self._continuation.prompt_positions(inputs)
        assert positions is not None, "prompts are shared only where their positions are known"
        cache = DynamicCache()
        inputs |= {"position_ids": positions, "past_key_values": cache}
        first, hidden = self._passed(inputs, 1, with_hidden, use_cache=True)
        first = first[state_of]
        hidden = None if hidden is None else hidden[state_of[: len(batch.steps)]]
        width = responses.shape[1] - 1
        if width == 0:
            return first, hidden
        cache.batch_select_indices(state_of)
        later, _ = self._passed(
            {
                "input_ids": responses[:, :-1],
                "attention_mask": torch.cat([prompt_mask[state_of], mask[:, :-1].to(prompt_mask.dtype)], dim=1),
                "position_ids": self._continuation.response_positions(positions[..., state_of, :], width),
                "past_key_values": cache,
            },
            width,
            with_hidden=False,
            use_cache=True,
        )
        return torch.cat([first, later], dim=1), hidden

    def _passed(
        self, inputs: dict[str, Any], columns: int, with_hidden: bool, use_cache: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what the head takes of the last columns, and the hidden states of the first of them if asked for."""
        states, hidden_states = self._head.passed(lambda: self._pass(inputs, columns, use_cache))
        hidden = hidden_states[:, -columns] if with_hidden and hidden_states is not None else None
        return states[:, -columns:], hidden

    def _pass(self, inputs: dict[str, Any], columns: int, use_cache: bool) -> Tensor:
        """Returns the model's logits, those of the last columns where it can leave out others."""
        kept = {"logits_to_keep": columns} if self._keeps_logits else {}
        logits: Tensor = self._policy(**inputs, use_cache=use_cache, **kept).logits
        return logits

    def _filler(self) -> MicroBatch:
        """Returns a micro-batch of one short step of no trajectory."""
        picture = io.BytesIO()
        Image.new("RGB", FILLER_IMAGE).save(picture, "PNG")
        step = ScoredStep("", picture.getvalue(), [self._inputs.end_id], cot_end=0, action_end=1)
        return MicroBatch([], [step], [step], [0])

    def _rows(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Returns the padded tokens (rows, R) and their mask (rows, R)."""
        width = max(1, *(len(row) for row in rows))
        padded = torch.full((len(rows), width), self._pad_id)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        return padded.to(self._device), (torch.arange(width) < lengths[:, None]).to(self._device)

    def _prompts(self, batch: MicroBatch) -> dict[str, Any]:
        """Returns the model's inputs for the states' prompts and images."""
        if batch.encoded is None:
            encoded = self._inputs.encode([s.prompt for s in batch.states], [s.image for s in batch.states])
            batch.encoded = dict(encoded)
        return {
            name: (tensor.to(self._policy.dtype) if tensor.is_floating_point() else tensor).to(self._device)
            for name, tensor in batch.encoded.items()
        }


def _keeps_all_keys(model: Any) -> bool:
    """Whether a pass leaves the keys and values of all its tokens behind, for others to continue from.

    Not with gradient checkpointing, for which transformers leaves them out, and not with sliding windows or states.
    """
    layers = DynamicCache(config=model.config).layers
    return not model.is_gradient_checkpointing and all(type(layer) is DynamicLayer for layer in layers)


def _stop_ends(batch: MicroBatch, with_stops: bool) -> list[tuple[int, int, int]]:
    """Returns step, column and last token of the stops that end where a response went on otherwise."""
    ends = []
    for n, step in enumerate(batch.steps if with_stops else ()):
        column = step.stop_column
        if column is not None and step.response_ids[column] != step.stop_ids[-1]:
            ends.append((n, column, step.stop_ids[-1]))
    return ends
