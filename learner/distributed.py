"""Data-parallel learners: who takes which instances, and how gradients and metrics are put together.

The loss of a batch is the mean over the trajectories that carry signal. With the batch divided among N
ranks it is the sum over ranks of (their share of those trajectories) x (their own mean), and so is its
gradient: ranks weight by their share and gradients are *summed*. That equals one learner's gradient to
rounding, however unevenly the batch divides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gflowvlm.shared.trajectory import Trajectory


@dataclass(frozen=True)
class Ranks:
    """This process among the data-parallel learners.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are. With more than one, `torch.distributed` must be initialised; its
            process group's timeout bounds every wait here.
        device: Where collectives take their tensors.
    """

    rank: int
    world_size: int
    device: torch.device

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size}")
        if self.world_size > 1 and (not dist.is_initialized() or dist.get_world_size() != self.world_size):
            raise RuntimeError(f"{self.world_size} learners need an initialised process group of that size")

    def shard(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Returns this rank's part of a batch: whole instances, about as many steps for everyone.

        Every rank must be given the same batch.

        Raises:
            RuntimeError: The ranks were given different batches.
        """
        if self.world_size == 1:
            return list(trajectories)
        if not self.agree("\n".join(t.trajectory_id for t in trajectories)):
            raise RuntimeError(f"the {self.world_size} learners were given different batches for one step")
        load: dict[str, int] = {}
        for t in trajectories:
            load[t.instance_id] = load.get(t.instance_id, 0) + len(t.steps)
        totals = [0] * self.world_size
        mine = set()
        # The sort is stable, so all ranks agree on the order among equals.
        for instance_id in sorted(load, key=lambda name: -load[name]):
            lightest = totals.index(min(totals))
            totals[lightest] += load[instance_id]
            if lightest == self.rank:
                mine.add(instance_id)
        return [t for t in trajectories if t.instance_id in mine]

    def agree(self, text: str) -> bool:
        """Returns whether all ranks gave the same text."""
        # 48 bits are exact in a float64.
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        bounds = self.max(torch.tensor([digest, -digest], dtype=torch.float64))
        return float(bounds[0]) == -float(bounds[1])

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Returns the elementwise maximum of a tensor over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces the gradients by their sum over all ranks, in one message. A missing one counts as 0."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size == 1:
            return values
        moved = values.to(self.device, copy=True)
        dist.all_reduce(moved, op=operation)
        return moved.to(values.device)
