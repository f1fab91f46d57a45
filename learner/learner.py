"""The learner: from trajectories to an update of the adapter. One process, or one of N data-parallel ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from learner.checkpoint import load_checkpoint, save_adapter, save_checkpoint
from learner.distributed import Ranks
from learner.heads import HEAD_OF_LOSS, StateHead
from learner.losses import LOSSES, LossOutput
from learner.mismatch import Mismatch, compare
from learner.model import adapter_parameters, default_device, load_policy
from learner.optimization import Optimization
from learner.reference import ReferenceScores
from learner.scoring import MicroBatch, Scorer, StepScores, steps_of
from learner.targets import LossInputs, Target, loss_inputs
from shared.config import RunConfig
from shared.policy_inputs import PolicyInputs
from shared.trajectory import Trajectory

_SUMMED = ("trajectories_used", "trajectories_dropped", "groups", "groups_of_one")
_MAXIMAL = ("residual_abs_max", "mismatch_max", "seconds_reference", "seconds_scoring", "seconds_backward")


class Learner:
    """Trains the adapter of a policy on trajectories.

    Args:
        config: The run's configuration.
        model_path: The policy's model directory or hub name.
        rank: Number of this learner.
        world_size: Number of learners; with more than one `torch.distributed` must be initialised (and the
            GPU of this rank must be the current one).

    Raises:
        UserError: The model cannot be loaded, or its LoRA targets are not in its language model.
    """

    def __init__(self, config: RunConfig, model_path: str, rank: int = 0, world_size: int = 1) -> None:
        self.config = config
        self.device = default_device()
        self._ranks = Ranks(rank, world_size, self.device)
        inputs = PolicyInputs.load(model_path)
        self.policy = load_policy(config.policy, model_path, seed=config.seed, device=self.device)
        self._scorer = Scorer(self.policy, inputs, self.device, config.learner.token_budget)
        self._reference = ReferenceScores(self.policy, self._scorer, capacity=config.buffer.capacity)
        name = config.objective.loss
        self._head: StateHead | None = None
        if name in HEAD_OF_LOSS:
            features = self._scorer.hidden_size()
            self._head = StateHead(HEAD_OF_LOSS[name], features, config.seed).to(self.device)
        head_parameters = [] if self._head is None else self._head.named_trainable()
        self._optimization = Optimization(adapter_parameters(self.policy), config.learner, head_parameters)
        self._loss = partial(LOSSES[name], residual_clip=config.objective.residual_clip)
        if name.endswith("subtb"):
            self._loss = partial(self._loss, subtb_lambda=config.objective.subtb_lambda)
        self._target = Target(
            reward_exponent=config.target.reward_exponent,
            log_reward_floor=config.target.log_reward_floor,
            reference_weight=config.target.reference_weight,
            cot_weight=config.policy.cot_weight,
            cut_is_terminal=config.target.truncation == "terminal",
            loss=name,
        )

    @property
    def steps_taken(self) -> int:
        """Batches taken so far; the number of the next step, counting from 0."""
        return self._optimization.counters.step

    def step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Takes one optimisation step on a batch.

        Args:
            trajectories: The whole batch, the same on every rank; each takes its share of the instances.

        Returns:
            Metrics, the same on every rank: the loss's own (`learner.losses.output`);
            ``trajectories_without_flow`` (see `learner.targets`); ``log_z`` (nats; the losses that estimate it:
            `tb`, `var_tb` and, from the flow of the first states, `flow_*` and `fl_*`); ``log_pf_mean`` (nats
            per transition, of the policy alone); ``grad_norm`` (of the adapter, before clipping),
            ``head_grad_norm`` (likewise, where the loss has a head), ``lr``, ``updated``, ``skipped_updates``;
            ``trajectories``, ``responses``, ``response_tokens``; ``micro_batches``; ``mismatch_mean`` and
            ``mismatch_max`` (nats per token, between the stored sampler's and the learner's log-probabilities:
            for replayed trajectories that is how far the policy has moved), ``mismatch_share`` (share of
            response tokens that have a sampler's log-probability); ``seconds_reference``,
            ``seconds_scoring``, ``seconds_backward`` (of the slowest rank).

        Raises:
            UserError: The gradient was not finite too many times in a row.
            RuntimeError: The ranks were given different batches.
        """
        mine = self._ranks.shard(trajectories)
        self._optimization.zero_grad()
        clock = _Clock()
        batches = self._scorer.pack(steps_of(mine))
        reference = self._reference.log_cot(mine, batches) if self._target.reference_weight > 0 else None
        seconds = {"seconds_reference": clock.lap()}

        scores, token_log_probs, kept = self._forward(batches)
        if self._head is not None and self.steps_taken == 0:
            self._centre_head(self._head, trajectories, mine, scores, reference)
        inputs = loss_inputs(mine, scores, reference, self._target)
        output = self._loss(**inputs.arguments())
        used = float(self._ranks.sum(output.metrics["trajectories_used"].double()))
        share = float(output.metrics["trajectories_used"]) / max(used, 1.0)
        seconds["seconds_scoring"] = clock.lap()

        if output.loss.requires_grad:
            (weights,) = torch.autograd.grad(output.loss * share, scores)
            self._backward(batches, kept, weights)
        self._ranks.sum_gradients(self._optimization.parameters)
        update = self._optimization.update(has_signal=used > 0)
        seconds["seconds_backward"] = clock.lap()

        mismatch = compare(mine, _by_trajectory(mine, token_log_probs))
        return {**self._metrics(mine, batches, inputs, output, share, mismatch, seconds), **update}

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Returns the log-probability (nats) of every response token, by trajectory, step and token."""
        steps = steps_of(trajectories)
        tokens: list[list[float]] = [[] for _ in steps]
        with torch.no_grad():
            for batch in self._scorer.pack(steps):
                _collect(batch, self._scorer.score_steps(batch), tokens)
        return _by_trajectory(trajectories, tokens)

    def save_adapter(self, directory: Path | str) -> None:
        """Writes the adapter in PEFT format, atomically. Call it on one rank."""
        save_adapter(self.policy, Path(directory))

    def save(self, directory: Path | str) -> None:
        """Writes a checkpoint, atomically. Call it on one rank.

        Raises:
            UserError: It cannot be written; nothing is left under its name.
        """
        save_checkpoint(self.policy, self._head, self._optimization, Path(directory))

    def load(self, directory: Path | str) -> None:
        """Restores a checkpoint. Call it on every rank.

        Raises:
            UserError: It is missing, corrupted, of another adapter or of a loss with another head.
        """
        load_checkpoint(self.policy, self._head, self._optimization, Path(directory))

    def _forward(self, batches: list[MicroBatch]) -> tuple[Tensor, list[list[float]], Tensor | None]:
        """Scores all micro-batches; keeps the graph of the first, the largest, only.

        Losses couple the trajectories of a group, which may lie in different micro-batches, so their
        gradient needs all scores before any graph is used up: the others are scored again in `_backward`.
        A batch that fits the token budget is scored once.

        Returns:
            (S, 3) scores as a leaf, (S, 4) with a head; the tokens' log-probabilities by step; and the first
            micro-batch's scores with their graph.
        """
        total = sum(len(batch.index) for batch in batches)
        scores = torch.zeros(total, 3 if self._head is None else 4)
        tokens: list[list[float]] = [[] for _ in range(total)]
        kept: Tensor | None = None
        for batch in reversed(batches):
            with torch.set_grad_enabled(batch is batches[0]):
                result, kept = self._scored(batch)
            scores[batch.index] = kept.detach().cpu()
            _collect(batch, result, tokens)
        return scores.requires_grad_(), tokens, kept

    def _scored(self, batch: MicroBatch) -> tuple[StepScores, Tensor]:
        """Returns a micro-batch's scores, and those that the loss takes, the head's number last: (N, 3 or 4)."""
        result = self._scorer.score_steps(batch, with_hidden=self._head is not None)
        stacked = result.stacked()
        if self._head is not None and result.hidden is not None:
            stacked = torch.cat([stacked, self._head(result.hidden)[:, None]], dim=1)
        return result, stacked

    def _centre_head(
        self,
        head: StateHead,
        trajectories: Sequence[Trajectory],
        mine: list[Trajectory],
        scores: Tensor,
        reference: Tensor | None,
    ) -> None:
        """Sets the head's constant from the first batch, the whole of it on every rank, and adds it to its scores."""
        estimates = loss_inputs(mine, scores.detach(), reference, self._target).first_estimates()
        own = {id(trajectory) for trajectory in mine}
        places = [i for i, trajectory in enumerate(trajectories) if id(trajectory) in own]
        everyones = torch.zeros(len(trajectories), dtype=torch.float64)
        everyones[places] = estimates
        head.centre_on(self._ranks.sum(everyones))
        with torch.no_grad():
            scores[:, 3] += float(head.centre)

    def _backward(self, batches: list[MicroBatch], kept: Tensor | None, weights: Tensor) -> None:
        """Accumulates the gradients of adapter and head, given d loss / d score of every step."""
        for batch in batches:
            stacked = self._scored(batch)[1] if kept is None else kept
            kept = None
            stacked.backward(weights[batch.index].to(stacked.device))

    def _metrics(
        self,
        mine: list[Trajectory],
        batches: list[MicroBatch],
        inputs: LossInputs,
        output: LossOutput,
        share: float,
        mismatch: Mismatch,
        seconds: dict[str, float],
    ) -> dict[str, float]:
        taken = torch.arange(inputs.log_pf.shape[1]) < inputs.length[:, None]
        local = {name: float(value) for name, value in output.metrics.items()}
        maximal = {name: value for name, value in {**local, **seconds}.items() if name in _MAXIMAL}
        maximal["mismatch_max"] = mismatch.max
        summed = {
            **{n: v if n in _SUMMED else v * share for n, v in local.items() if n not in _MAXIMAL},
            "trajectories_without_flow": inputs.without_flow,
            "trajectories": len(mine),
            "responses": sum(len(t.steps) for t in mine),
            "response_tokens": mismatch.response_tokens,
            "micro_batches": len(batches),
            "log_pf_mean": float(torch.where(taken, inputs.policy_log_pf, 0.0).sum()),
            "mismatch_mean": mismatch.total,
        }
        first_flow = inputs.log_first_flow()
        if first_flow is not None:
            summed["log_z"] = float(first_flow.detach().sum())
        counts = [float(taken.sum()), float(mismatch.tokens)]
        sums = self._ranks.sum(torch.tensor([*summed.values(), *counts], dtype=torch.float64)).tolist()
        result = dict(zip(summed, sums, strict=False))
        transitions, compared = sums[-2:]
        result["log_pf_mean"] /= max(transitions, 1.0)
        if first_flow is not None:
            result["log_z"] /= max(result["trajectories"], 1.0)
        result["mismatch_mean"] /= max(compared, 1.0)
        result["mismatch_share"] = compared / max(result["response_tokens"], 1.0)
        maxima = self._ranks.max(torch.tensor(list(maximal.values()), dtype=torch.float64)).tolist()
        return {**result, **dict(zip(maximal, maxima, strict=True))}


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


def _collect(batch: MicroBatch, result: StepScores, tokens: list[list[float]]) -> None:
    for index, step, row in zip(batch.index, batch.steps, result.token_log_probs.tolist(), strict=True):
        tokens[index] = row[: len(step.response_ids)]


def _by_trajectory(trajectories: Sequence[Trajectory], per_step: list[list[float]]) -> list[list[list[float]]]:
    parts = iter(per_step)
    return [[next(parts) for _ in trajectory.steps] for trajectory in trajectories]
