"""log P_ref of chains of thought: the policy with its adapter switched off (objectives.md, `reference_weight`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gflowvlm.learner.model import reference_policy
from gflowvlm.learner.packing import MicroBatch, steps_of
from gflowvlm.learner.scoring import Scorer
from gflowvlm.shared.trajectory import Trajectory


class ReferenceScores:
    """Computes log P_ref(c) of every step once per trajectory and remembers it.

    The reference does not change during a run, so a replayed trajectory costs nothing the second time.

    Args:
        policy: The PEFT model.
        scorer: Its scorer.
        capacity: Trajectories to remember; the least recently used are forgotten first.
    """

    def __init__(self, policy: Any, scorer: Scorer, capacity: int) -> None:
        self._policy = policy
        self._scorer = scorer
        self._capacity = capacity
        self._known: OrderedDict[str, list[float]] = OrderedDict()

    def log_cot(self, trajectories: Sequence[Trajectory], batches: Sequence[MicroBatch]) -> Tensor:
        """Returns log P_ref(c) of all S steps, in order: (S,) float64.

        Args:
            trajectories: The trajectories.
            batches: Their steps, packed: used as they are when no trajectory is known yet, so that the
                processor is not called twice.
        """
        unknown = [t for t in trajectories if t.trajectory_id not in self._known]
        new = self._score(unknown, batches if len(unknown) == len(trajectories) else None)
        for trajectory, values in zip(unknown, new, strict=True):
            self._known[trajectory.trajectory_id] = values
        result = []
        for trajectory in trajectories:
            self._known.move_to_end(trajectory.trajectory_id)
            result += self._known[trajectory.trajectory_id]
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return torch.tensor(result, dtype=torch.float64)

    def _score(self, trajectories: Sequence[Trajectory], batches: Sequence[MicroBatch] | None) -> list[list[float]]:
        steps = steps_of(trajectories)
        log_cot = torch.zeros(len(steps))
        with reference_policy(self._policy):
            for batch in self._scorer.in_step(self._scorer.pack(steps) if batches is None else batches):
                scores = self._scorer.score_steps(batch, with_stops=False).log_cot.cpu()
                if not batch.is_filler:
                    log_cot[batch.index] = scores
        parts = log_cot.split([len(t.steps) for t in trajectories]) if trajectories else ()
        return [part.tolist() for part in parts]
