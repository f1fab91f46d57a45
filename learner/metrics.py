"""Figures of a learner step, in a form that several ranks can add up."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gflowvlm.learner.distributed import Ranks


@dataclass(frozen=True)
class StepMetrics:
    """One rank's part of a step's figures.

    Attributes:
        sums: Name -> what adds up over the ranks.
        means: Name -> (total, count); over all ranks, total / count, 0 where the count is 0.
        maxima: Name -> what the largest is taken of.
    """

    sums: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def __or__(self, other: StepMetrics) -> StepMetrics:
        """Both together; of equal names the other's counts."""
        return StepMetrics(self.sums | other.sums, self.means | other.means, self.maxima | other.maxima)

    def over_ranks(self, ranks: Ranks) -> dict[str, float]:
        """Returns the figures of all ranks together. Every rank must have the same names in the same order."""
        totals = [total for total, _ in self.means.values()]
        counts = [count for _, count in self.means.values()]
        values = torch.tensor([*self.sums.values(), *totals, *counts], dtype=torch.float64)
        added = ranks.sum(values).tolist()
        sums, totals, counts = (
            added[: len(self.sums)],
            added[len(self.sums) : len(self.sums) + len(totals)],
            added[len(self.sums) + len(totals) :],
        )
        result = dict(zip(self.sums, sums, strict=True))
        for name, total, count in zip(self.means, totals, counts, strict=True):
            result[name] = total / count if count > 0 else 0.0
        largest = ranks.max(torch.tensor(list(self.maxima.values()), dtype=torch.float64)).tolist()
        return result | dict(zip(self.maxima, largest, strict=True))
