"""A base model divided among the learners, for one that does not fit on a GPU.

Fully sharded data parallelism (Zhao et al. 2023, arXiv 2304.11277; torch's `fully_shard`, "FSDP2").

Every rank holds 1/N of each frozen weight and gathers one transformer block at a time while it passes through it.
The adapter stays whole on every rank: it is small, its gradients are summed once a step instead of once a pass
(`gflowvlm.learner.distributed`), and what is saved neither needs the other ranks nor tells how many there were.

Nothing is cast: the base model is in `policy.dtype` already and the adapter stays in float32, so that a sharded model
computes what a whole one does, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.model import empty_policy, load_policy
from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError

_WITHOUT = "it can be trained with learner.sharding=none only"


def load_sharded_policy(settings: PolicySettings, model_path: str, *, seed: int, ranks: Ranks) -> Any:
    """Loads the policy that `gflowvlm.learner.model.load_policy` loads, its base model divided among the ranks.

    From then on every forward and every backward pass is a collective: all ranks must make the same ones, in the
    same order. Passes of different inputs are fine. Rank 0 alone reads the weights, into main memory, and sends
    them round one by one, so that no GPU and no other rank ever has the whole model.

    Args:
        settings: Precision, adapter and checkpointing.
        model_path: Model directory or hub name.
        seed: Seed of the adapter's initialisation.
        ranks: Who shares it; more than one. All of them must call this.

    Returns:
        The PEFT model, on this rank's device.

    Raises:
        UserError: As `load_policy`; or the model shows no transformer blocks to gather one by one, or is loaded
            in other precisions than it is built in.
    """
    policy = empty_policy(settings, model_path)
    whole = load_policy(settings, model_path, seed=seed, device=torch.device("cpu")) if ranks.rank == 0 else None
    described = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in _tensors(policy if whole is None else whole)]
    if not ranks.agree("\n".join(described)):
        raise UserError(f"model {model_path!r}: it keeps some weights in a precision of their own; {_WITHOUT}")
    _divide(policy, ranks)
    policy.to_empty(device=ranks.device)
    _broadcast_weights(policy, whole, ranks)
    return policy


def _divide(policy: Any, ranks: Ranks) -> None:
    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(blocks) == 0:
        name = type(policy.get_base_model()).__name__
        raise UserError(f"learner.sharding: no transformer blocks are known in {name}; {_WITHOUT}")
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    adapter = {parameter for parameter in policy.parameters() if parameter.requires_grad}
    # Inner blocks come first: a module takes what its own have left. The root is given back after each pass like
    # the rest, or saving, which one rank does alone, would give it back there only.
    for module in (*reversed(blocks), policy):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapter)


def _broadcast_weights(policy: Any, whole: Any | None, ranks: Ranks) -> None:
    """Fills every rank's parts and its adapter with rank 0's numbers, one tensor after the other."""
    known = {} if whole is None else dict(_tensors(whole))
    with torch.no_grad():
        for name, part in _tensors(policy):
            if whole is None:
                full = torch.empty(part.shape, dtype=part.dtype, device=ranks.device)
            else:
                full = known[name].to(ranks.device)
            dist.broadcast(full, src=0)
            if isinstance(part, DTensor):
                mine = distribute_tensor(full, part.device_mesh, part.placements, src_data_rank=None)
                part.to_local().copy_(mine.to_local())
            else:
                part.copy_(full)


def _tensors(policy: Any) -> Iterator[tuple[str, Tensor]]:
    return chain(policy.named_parameters(), policy.named_buffers())
