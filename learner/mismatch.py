"""How far the sampler's and the learner's log-probabilities of the same tokens are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gflowvlm.shared.trajectory import Trajectory

WORST_SHOWN = 5
"""Tokens that `Mismatch.worst` lists."""

QUANTILE = 0.99
"""Share of the tokens whose difference is at most `Mismatch.high`."""


@dataclass(frozen=True)
class TokenMismatch:
    """One token on which the two disagree; log-probabilities in nats."""

    trajectory_id: str
    step: int
    position: int
    token_id: int
    sampler: float
    learner: float

    @property
    def difference(self) -> float:
        """|sampler − learner|; infinite when one of them is not a number."""
        difference = abs(self.sampler - self.learner)
        return math.inf if math.isnan(difference) else difference


@dataclass(frozen=True)
class Mismatch:
    """Sampler against learner over all sampled tokens.

    Attributes:
        mean: Mean absolute difference, nats; 0 without tokens.
        high: The `QUANTILE` of the absolute differences, nats; 0 without tokens.
        max: Largest absolute difference, nats; 0 without tokens.
        total: Sum of absolute differences.
        tokens: Sampled tokens compared.
        trajectories: Trajectories compared.
        response_tokens: All response tokens (those that were not sampled have nothing to compare with).
        worst: The tokens that differ most, worst first.
    """

    mean: float
    high: float
    max: float
    total: float
    tokens: int
    trajectories: int
    response_tokens: int
    worst: list[TokenMismatch]


def compare(trajectories: Sequence[Trajectory], scores: Sequence[Sequence[Sequence[float]]]) -> Mismatch:
    """Compares the log-probabilities stored by the sampler with the learner's.

    They must agree only where the learner scored with the parameters that sampled: at start, or for the
    newest version. Tokens that were not sampled (stored as NaN) are left out.

    Args:
        trajectories: With the sampler's log-probabilities.
        scores: The learner's, by trajectory, step and token (`Learner.score`).
    """
    compared: list[TokenMismatch] = []
    response_tokens = 0
    for trajectory, of_steps in zip(trajectories, scores, strict=True):
        for number, (step, learner) in enumerate(zip(trajectory.steps, of_steps, strict=True)):
            response_tokens += len(step.response_ids)
            rows = zip(step.response_ids, step.sampler_log_probs, learner, strict=True)
            compared += [
                TokenMismatch(trajectory.trajectory_id, number, position, token, sampler, value)
                for position, (token, sampler, value) in enumerate(rows)
                if not math.isnan(sampler)
            ]
    total = sum(token.difference for token in compared)
    worst = sorted(compared, key=lambda token: -token.difference)
    # So many tokens lie above the quantile.
    above = int((1 - QUANTILE) * len(worst))
    return Mismatch(
        mean=total / max(1, len(compared)),
        high=worst[above].difference if worst else 0.0,
        max=worst[0].difference if worst else 0.0,
        total=total,
        tokens=len(compared),
        trajectories=len(trajectories),
        response_tokens=response_tokens,
        worst=worst[:WORST_SHOWN],
    )
