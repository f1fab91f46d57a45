"""The learner: from trajectories to an update of the adapter. One process, or one of N data-parallel ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gflowvlm.learner.checkpoint import load_checkpoint, save_adapter, save_checkpoint
from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.heads import StateHead
from gflowvlm.learner.metrics import StepMetrics
from gflowvlm.learner.mismatch import Mismatch, compare
from gflowvlm.learner.model import adapter_parameters, load_policy
from gflowvlm.learner.objectives import ScoredBatch, make_objective
from gflowvlm.learner.optimization import Optimization
from gflowvlm.learner.packing import MicroBatch, steps_of
from gflowvlm.learner.reference import ReferenceScores
from gflowvlm.learner.scoring import Scorer, StepScores
from gflowvlm.learner.sharding import load_sharded_policy
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.device import device_name
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import Trajectory


class Learner:
    """Trains the adapter of a policy on trajectories.

    Args:
        config: The run's configuration; without ``learner.gpus_per_worker`` it computes on the CPU.
        model_path: The policy's model directory or hub name.
        rank: Number of this learner.
        world_size: Number of learners; with more than one `torch.distributed` must be initialised (and the
            GPU of this rank must be the current one).
        made: A policy that was made already, on its device, and its inputs; nothing is loaded then.

    Raises:
        UserError: The model cannot be loaded, its LoRA targets are not in its language model, or there is no GPU
            where one was asked for.
    """

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        rank: int = 0,
        world_size: int = 1,
        made: tuple[Any, PolicyInputs] | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(
            device_name(config.learner.gpus_per_worker, "learner.gpus_per_worker", torch.cuda.is_available())
        )
        self._ranks = Ranks(rank, world_size, self.device)
        self._sharded = config.learner.sharding == "fsdp" and world_size > 1
        inputs = PolicyInputs.load(model_path, prompts=config.policy) if made is None else made[1]
        if made is not None:
            self.policy = made[0]
        elif self._sharded:
            self.policy = load_sharded_policy(config.policy, model_path, seed=config.seed, ranks=self._ranks)
        else:
            self.policy = load_policy(config.policy, model_path, seed=config.seed, device=self.device)
        sharded_over = self._ranks if self._sharded else None
        self._objective = make_objective(config)
        self._scorer = Scorer(
            self.policy,
            inputs,
            self.device,
            config.learner.token_budget,
            sharded_over,
            with_stops=self._objective.uses_stops,
        )
        self._reference = ReferenceScores(self.policy, self._scorer, capacity=config.buffer.capacity)
        self._head: StateHead | None = None
        if self._objective.head is not None:
            self._head = StateHead(self._objective.head, self._scorer.hidden_size(), config.seed).to(self.device)
        head_parameters = [] if self._head is None else self._head.named_trainable()
        self._optimization = Optimization(adapter_parameters(self.policy), config.optimization, head_parameters)

    @property
    def steps_taken(self) -> int:
        """Batches taken so far; the number of the next step, counting from 0."""
        return self._optimization.counters.step

    def step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Takes one step on a batch: one update, or one for each epoch of the objective.

        Args:
            trajectories: The whole batch, the same on every rank; each takes its share of the instances.

        Returns:
            Metrics, the same on every rank: those of the objective (`gflowvlm.learner.losses.output`,
            `gflowvlm.learner.baselines`; of the last epoch), among them ``loss``, ``trajectories_used``,
            ``trajectories_dropped`` and ``log_pf_mean`` (nats per transition, of the policy alone), and for
            losses that estimate it ``log_z`` (nats); ``grad_norm`` (of the adapter, before clipping),
            ``head_grad_norm`` (likewise, where the objective has a head), ``lr``, ``updated``,
            ``skipped_updates``, ``steps_without_signal``; ``trajectories``, ``responses``,
            ``response_tokens``; ``micro_batches``;
            ``mismatch_mean`` and ``mismatch_max`` (nats per token, between the stored sampler's and the
            learner's log-probabilities: for replayed trajectories that is how far the policy has moved),
            ``mismatch_share`` (share of response tokens that have a sampler's log-probability);
            ``seconds_reference``, ``seconds_scoring``, ``seconds_loss``, ``seconds_backward`` (of the slowest
            rank, all epochs together).

        Raises:
            UserError: The gradient was not finite too many times in a row.
            RuntimeError: The ranks were given different batches.
        """
        mine = self._ranks.shard(trajectories)
        clock = _Clock()
        batches = self._scorer.in_step(self._scorer.pack(steps_of(mine)))
        reference = self._reference.log_cot(mine, batches) if self._objective.uses_reference else None
        clock.lap("seconds_reference")

        scores, token_log_probs, kept = self._forward(batches)
        if self._head is not None and self.steps_taken == 0:
            estimates = self._objective.first_estimates(ScoredBatch(mine, scores.detach(), reference))
            self._centre_head(self._head, trajectories, mine, estimates, scores)
        clock.lap("seconds_scoring")
        loss_of = self._objective.prepare(ScoredBatch(mine, scores.detach(), reference), self._ranks)
        had_signal, update = False, {"updated": 0.0}
        for epoch in range(self._objective.epochs):
            if epoch > 0:
                scores, _, kept = self._forward(batches)
                clock.lap("seconds_scoring")
            self._optimization.zero_grad()
            output = loss_of(scores)
            count = float(self._ranks.sum(torch.tensor(output.count, dtype=torch.float64)))
            weights = torch.zeros_like(scores)
            if output.loss.requires_grad:
                (weights,) = torch.autograd.grad(output.loss * (output.count / max(count, 1.0)), scores)
            # No residual, or nothing but advantages of 0: there is nothing to learn.
            own_signal = torch.any(weights != 0.0)
            has_signal = bool(self._ranks.sum(own_signal.double()) > 0)
            had_signal = had_signal or has_signal
            clock.lap("seconds_loss")
            # A rank without a signal of its own still helps the others through a sharded model.
            if own_signal or (has_signal and self._sharded):
                self._backward(batches, kept, weights)
            self._ranks.sum_gradients(self._optimization.parameters)
            made = self._optimization.update(has_signal)
            update = made | {"updated": max(made["updated"], update["updated"])}
            clock.lap("seconds_backward")
        update |= self._optimization.end_step(had_signal)

        mismatch = compare(mine, _by_trajectory(mine, token_log_probs))
        figures = output.metrics | _batch_figures(mine, batches, mismatch, clock.seconds)
        return {**figures.over_ranks(self._ranks), **update}

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Returns the log-probability (nats) of every response token, by trajectory, step and token.

        Call it on every rank where `learner.sharding` divides the model, each with what it wants scored, if anything.
        """
        steps = steps_of(trajectories)
        tokens: list[list[float]] = [[] for _ in steps]
        with torch.no_grad():
            for batch in self._scorer.in_step(self._scorer.pack(steps)):
                _collect(batch, self._scorer.score_steps(batch), tokens)
        return _by_trajectory(trajectories, tokens)

    def enter_device(self) -> None:
        """Brings the model to its device, for which `leave_device` may have made room (`learner.offload`)."""
        if self.config.learner.offload:
            self._move(self.device)

    def leave_device(self) -> None:
        """Gives the device's memory back for others: all but the model's, and with `learner.offload` that too."""
        self._optimization.zero_grad()
        if self.config.learner.offload:
            self._move(torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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

    def _move(self, device: torch.device) -> None:
        self.policy.to(device)
        if self._head is not None:
            self._head.to(device)
        self._optimization.move(device)

    def _forward(self, batches: list[MicroBatch]) -> tuple[Tensor, list[list[float]], Tensor | None]:
        """Scores all micro-batches; keeps the graph of the first, the largest, only.

        Losses couple the trajectories of a group, which may lie in different micro-batches, so their
        gradient needs all scores before any graph is used up: the others are scored again in `_backward`.
        A batch that fits the token budget is scored once.

        Returns:
            (S, 4) scores as a leaf, (S, 5) with a head; the tokens' log-probabilities by step; and the first
            micro-batch's scores with their graph.
        """
        total = sum(len(batch.index) for batch in batches)
        scores = torch.zeros(total, 4 if self._head is None else 5)
        tokens: list[list[float]] = [[] for _ in range(total)]
        kept: Tensor | None = None
        for batch in reversed(batches):
            with torch.set_grad_enabled(batch is batches[0]):
                result, kept = self._scored(batch)
            if not batch.is_filler:
                scores[batch.index] = kept.detach().cpu()
            _collect(batch, result, tokens)
        return scores.requires_grad_(), tokens, kept

    def _scored(self, batch: MicroBatch) -> tuple[StepScores, Tensor]:
        """Returns a micro-batch's scores, and those that the loss takes, the head's number last: (N, 4 or 5)."""
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
        estimates: Tensor,
        scores: Tensor,
    ) -> None:
        """Sets the head's constant from the first batch, the whole of it on every rank, and adds it to its scores."""
        own = {id(trajectory) for trajectory in mine}
        places = [i for i, trajectory in enumerate(trajectories) if id(trajectory) in own]
        everyones = torch.zeros(len(trajectories), dtype=torch.float64)
        everyones[places] = estimates
        head.centre_on(self._ranks.sum(everyones))
        with torch.no_grad():
            scores[:, -1] += float(head.centre)

    def _backward(self, batches: list[MicroBatch], kept: Tensor | None, weights: Tensor) -> None:
        """Accumulates the gradients of adapter and head, given d loss / d score of every step."""
        for batch in batches:
            stacked = self._scored(batch)[1] if kept is None else kept
            kept = None
            weight = torch.zeros_like(stacked) if batch.is_filler else weights[batch.index].to(stacked.device)
            stacked.backward(weight)


class _Clock:
    """Adds up where the time goes, seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the last call under a name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _batch_figures(
    mine: Sequence[Trajectory], batches: Sequence[MicroBatch], mismatch: Mismatch, seconds: dict[str, float]
) -> StepMetrics:
    tokens, compared = float(mismatch.response_tokens), float(mismatch.tokens)
    return StepMetrics(
        sums={
            "trajectories": float(len(mine)),
            "responses": float(sum(len(t.steps) for t in mine)),
            "response_tokens": tokens,
            "micro_batches": float(sum(not batch.is_filler for batch in batches)),
        },
        means={"mismatch_mean": (mismatch.total, compared), "mismatch_share": (compared, tokens)},
        maxima={"mismatch_max": mismatch.max, **seconds},
    )


def _collect(batch: MicroBatch, result: StepScores, tokens: list[list[float]]) -> None:
    if batch.is_filler:
        return
    for index, step, row in zip(batch.index, batch.steps, result.token_log_probs.tolist(), strict=True):
        tokens[index] = row[: len(step.response_ids)]


def _by_trajectory(trajectories: Sequence[Trajectory], per_step: list[list[float]]) -> list[list[list[float]]]:
    parts = iter(per_step)
    return [[next(parts) for _ in trajectory.steps] for trajectory in trajectories]
