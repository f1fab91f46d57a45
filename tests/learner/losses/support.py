"""Random padded batches, and the objectives once more as plain loops over Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Rollout:
    """One trajectory, unpadded: `log_pf` has n entries, the per-state lists n + 1.

    `log_flow` is log F for the `flow_*` losses; the `fl_*` losses are given log F̃ = log F − log R.
    """

    log_pf: list[float]
    log_p_stop: list[float]
    log_reward: list[float]
    log_pb: list[float]
    stopped: bool
    instance: int
    log_z: float
    log_flow: list[float]

    @property
    def n(self) -> int:
        return len(self.log_pf)

    def zeta(self) -> float:
        return sum(self.log_pf) + self.log_p_stop[self.n] - self.log_reward[self.n] - sum(self.log_pb)


def random_rollouts(
    seed: int, *, count: int = 23, longest: int = 6, instances: int = 6, log_reward_scale: float = 3.0
) -> list[Rollout]:
    """Mixed lengths (0 included), cut-offs, forced stops, groups of every size."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, size: int) -> list[float]:
        return (low + (high - low) * torch.rand(size, generator=g, dtype=torch.float64)).tolist()

    def integer(high: int) -> int:
        return int(torch.randint(high, (), generator=g))

    rollouts = []
    for _ in range(count):
        n, instance, end = integer(longest + 1), integer(instances), integer(3)
        log_p_stop = uniform(-5, -0.01, n + 1)
        if end == 0:  # forced by the environment
            log_p_stop[n] = 0.0
        rollouts.append(
            Rollout(
                log_pf=uniform(-4, 0, n),
                log_p_stop=log_p_stop,
                log_reward=uniform(-log_reward_scale, log_reward_scale, n + 1),
                log_pb=uniform(-2, 0, n),
                stopped=end != 2,
                instance=instance,
                log_z=1.5 * instance - 2.0,
                log_flow=uniform(-2, 4, n + 1),
            )
        )
    return rollouts


def pad_rollouts(
    rollouts: list[Rollout],
    *,
    extra: int = 0,
    padding: float = math.nan,
    dtype: torch.dtype = torch.float64,
    with_pb: bool = False,
) -> dict[str, Any]:
    """The keyword tensors of the losses, `log_z` apart; what is padding holds `padding`."""
    T = max((r.n for r in rollouts), default=0) + extra

    def rows(values: list[list[float]], width: int) -> Tensor:
        padded = [row + [padding] * (width - len(row)) for row in values]
        return torch.tensor(padded, dtype=dtype).reshape(len(rollouts), width)

    batch = {
        "log_pf": rows([r.log_pf for r in rollouts], T),
        "log_p_stop": rows([r.log_p_stop for r in rollouts], T + 1),
        "log_reward": rows([r.log_reward for r in rollouts], T + 1),
        "length": torch.tensor([r.n for r in rollouts], dtype=torch.int64),
        "stopped": torch.tensor([r.stopped for r in rollouts], dtype=torch.bool),
        "instance": torch.tensor([r.instance for r in rollouts], dtype=torch.int64),
    }
    if with_pb:
        batch["log_pb"] = rows([r.log_pb for r in rollouts], T)
    return batch


def log_z_of(rollouts: list[Rollout], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([r.log_z for r in rollouts], dtype=dtype)


def log_flow_of(
    name: str, rollouts: list[Rollout], width: int, *, padding: float = math.nan, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(K, width) what the loss `name` learns: log F, or log F̃ for the forward-looking ones."""
    rows = []
    for r in rollouts:
        earned = r.log_reward if name.startswith("fl_") else [0.0] * (r.n + 1)
        row = [f - e for f, e in zip(r.log_flow, earned, strict=True)]
        rows.append(row + [padding] * (width - len(row)))
    return torch.tensor(rows, dtype=dtype).reshape(len(rollouts), width)


def extras(name: str, rollouts: list[Rollout], batch: dict[str, Any], *, padding: float = math.nan) -> dict[str, Any]:
    """What the loss `name` needs beside the common tensors of the padded batch."""
    dtype = batch["log_reward"].dtype
    if name == "tb":
        return {"log_z": log_z_of(rollouts, dtype)}
    if name in WITH_FLOW:
        width = batch["log_reward"].shape[1]
        return {"log_flow": log_flow_of(name, rollouts, width, padding=padding, dtype=dtype)}
    return {}


WITH_FLOW = ("flow_db", "flow_subtb", "fl_db", "fl_subtb")
SUB_TRAJECTORY = ("db", "subtb", *WITH_FLOW)
"""Losses that learn from incomplete trajectories."""


def without_pb(rollouts: list[Rollout]) -> list[Rollout]:
    return [replace(r, log_pb=[0.0] * r.n) for r in rollouts]


# The reference: one list of (weight, residual) a trajectory, then the averages as the definition has them.

Weighted = list[tuple[float, float]]


def reference_tb(rollouts: list[Rollout]) -> list[Weighted]:
    return [[(1.0, r.log_z + r.zeta())] if r.stopped else [] for r in rollouts]


def reference_var_tb(rollouts: list[Rollout]) -> list[Weighted]:
    zetas: dict[int, list[float]] = {}
    for r in rollouts:
        if r.stopped:
            zetas.setdefault(r.instance, []).append(r.zeta())
    result: list[Weighted] = []
    for r in rollouts:
        group = zetas.get(r.instance, [])
        if r.stopped and len(group) >= 2:
            result.append([(1.0, r.zeta() - sum(group) / len(group))])
        else:
            result.append([])
    return result


def reference_subtb(rollouts: list[Rollout], subtb_lambda: float) -> list[Weighted]:
    result = []
    for r in rollouts:
        pairs = []
        for i in range(r.n + 1):
            for j in range(i + 1, r.n + 1):
                residual = r.log_reward[i] + r.log_p_stop[j] - r.log_reward[j] - r.log_p_stop[i]
                for k in range(i, j):
                    residual += r.log_pf[k] - r.log_pb[k]
                pairs.append((subtb_lambda ** (j - i), residual))
        result.append(pairs)
    return result


def reference_db(rollouts: list[Rollout]) -> list[Weighted]:
    result = []
    for r in rollouts:
        steps = []
        for t in range(r.n):
            forward = r.log_reward[t] - r.log_p_stop[t] + r.log_pf[t]
            backward = r.log_reward[t + 1] - r.log_p_stop[t + 1] + r.log_pb[t]
            steps.append((1.0, forward - backward))
        result.append(steps)
    return result


def flow_states(r: Rollout, forward_looking: bool) -> tuple[list[float], list[float]]:
    """(log F at the visited states, log P_F − log P_B of the transitions), the terminal state included."""
    if forward_looking:
        still_to_come = [f - e for f, e in zip(r.log_flow, r.log_reward, strict=True)]
        flows = [f + e for f, e in zip(still_to_come, r.log_reward, strict=True)]
    else:
        flows = list(r.log_flow)
    ratios = [f - b for f, b in zip(r.log_pf, r.log_pb, strict=True)]
    if r.stopped:
        flows.append(r.log_reward[r.n])
        ratios.append(r.log_p_stop[r.n])
    return flows, ratios


def reference_flow_subtb(rollouts: list[Rollout], subtb_lambda: float, forward_looking: bool) -> list[Weighted]:
    result = []
    for r in rollouts:
        flows, ratios = flow_states(r, forward_looking)
        result.append(
            [
                (subtb_lambda ** (j - i), flows[i] + sum(ratios[i:j]) - flows[j])
                for i in range(len(flows))
                for j in range(i + 1, len(flows))
            ]
        )
    return result


def reference_flow_db(rollouts: list[Rollout], forward_looking: bool) -> list[Weighted]:
    result = []
    for r in rollouts:
        flows, ratios = flow_states(r, forward_looking)
        result.append([(1.0, flows[t] + ratio - flows[t + 1]) for t, ratio in enumerate(ratios)])
    return result


REFERENCES: dict[str, Callable[[list[Rollout]], list[Weighted]]] = {
    "tb": reference_tb,
    "var_tb": reference_var_tb,
    "db": reference_db,
    "subtb": lambda rollouts: reference_subtb(rollouts, 0.9),
    "flow_db": lambda rollouts: reference_flow_db(rollouts, False),
    "fl_db": lambda rollouts: reference_flow_db(rollouts, True),
    "flow_subtb": lambda rollouts: reference_flow_subtb(rollouts, 0.9, False),
    "fl_subtb": lambda rollouts: reference_flow_subtb(rollouts, 0.9, True),
}


def reference_mean(weighted: list[Weighted], of: Callable[[float], float]) -> float:
    """Mean over the trajectories with residuals of each one's weighted mean of `of(residual)`."""
    means = []
    for residuals in weighted:
        if residuals:
            total = sum(w for w, _ in residuals)
            means.append(sum(w * of(r) for w, r in residuals) / total)
    return sum(means) / len(means) if means else 0.0


def reference_penalty(residual: float, clip: float | None) -> float:
    if clip is None or abs(residual) <= clip:
        return residual**2
    return clip**2 + 2 * clip * (abs(residual) - clip)
