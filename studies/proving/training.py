"""Training a small policy with one of the losses, and measuring it exactly on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gflowvlm.learner.losses import LOSSES
from gflowvlm.studies.proving.policy import Policy, imitate
from gflowvlm.studies.proving.rollouts import Sampler, loss_inputs
from gflowvlm.studies.proving.state_graph import StateGraph, jensen_shannon, outcome_distribution, total_variation

ONE_PASS_STATES = 512
"""Up to so many states the pass that samples is also the one to differentiate; beyond, only what a batch visits is."""


@dataclass(frozen=True)
class Training:
    """How one policy is trained.

    Attributes:
        loss: Name in `gflowvlm.learner.losses.LOSSES`.
        trajectories: How many are sampled in all.
        batch_size: K, trajectories of a step; all of them are new, none is replayed.
        learning_rate: Of Adam at the start; it falls linearly to 0.
        log_z_learning_rate: Of `tb`'s log Z.
        hidden: Width of the two hidden layers.
        exploration: Share of actions drawn uniformly at the start; it falls linearly to 0.
        subtb_lambda: λ of the `*subtb` losses.
        cut_off_share: Share of trajectories cut off before their end.
        learned_backward: Whether P_B is learned; otherwise it is uniform.
        evaluations: How often the policy is measured, evenly over the trajectories.
    """

    loss: str
    trajectories: int = 4_000
    batch_size: int = 16
    learning_rate: float = 2e-2
    log_z_learning_rate: float = 0.3
    hidden: int = 128
    exploration: float = 0.1
    subtb_lambda: float = 0.9
    cut_off_share: float = 0.0
    learned_backward: bool = False
    evaluations: int = 80


@dataclass(frozen=True)
class Measured:
    """The policy after some training.

    Attributes:
        trajectories: Sampled so far.
        total_variation: Exact, between its distribution over outcomes and R/Z.
        jensen_shannon: The same divergence in nats.
        modes: Modes that training has stopped at so far.
        loss: Of the last batch; 0 before the first.
        seconds: Spent on sampling and learning so far, without measuring.
    """

    trajectories: int
    total_variation: float
    jensen_shannon: float
    modes: int
    loss: float
    seconds: float


def train(graph: StateGraph, training: Training, seed: int) -> Iterator[Measured]:
    """Trains a policy and yields what it is before, on the way and at the end.

    The same seed gives the same figures, `seconds` apart, on the same machine.
    """
    learner = _Learner(graph, training, seed)
    steps = max(1, training.trajectories // training.batch_size)
    measured_at = {round(steps * i / training.evaluations) for i in range(1, training.evaluations + 1)}
    yield learner.measure()
    for step in range(steps):
        learner.step(step / steps)
        if step + 1 in measured_at:
            yield learner.measure()


def batch_loss(name: str, inputs: dict[str, Tensor], *, log_z: Tensor, subtb_lambda: float) -> Tensor:
    """Returns one of `gflowvlm.learner.losses` on a batch, given what that loss takes.

    Args:
        name: Of the loss.
        inputs: See `loss_inputs`.
        log_z: Scalar; of the one instance there is.
        subtb_lambda: λ of the `*subtb` losses.
    """
    wanted = dict(inputs)
    log_flow = wanted.pop("log_flow")
    if name.startswith(("flow_", "fl_")):
        wanted["log_flow"] = log_flow
    elif name == "tb":
        wanted["log_z"] = log_z.expand(wanted["length"].shape)
    if name.endswith("subtb"):
        return LOSSES[name](**wanted, subtb_lambda=subtb_lambda).loss
    return LOSSES[name](**wanted).loss


class _Learner:
    """Policy, optimiser and counters of one training."""

    def __init__(self, graph: StateGraph, training: Training, seed: int) -> None:
        self._graph, self._training = graph, training
        self._policy = Policy(graph, hidden=training.hidden, learned_backward=training.learned_backward, seed=seed)
        if graph.start_policy is not None:
            imitate(self._policy, graph.start_policy)
        self._sampler = Sampler(graph, torch.Generator().manual_seed(seed))
        self._log_reward = graph.log_reward.float()
        self._rates = (training.learning_rate, training.log_z_learning_rate)
        self._optimizer = torch.optim.Adam(
            [
                {"params": list(self._policy.layers.parameters()), "lr": self._rates[0]},
                {"params": [self._policy.log_z], "lr": self._rates[1]},
            ],
            fused=True,
        )
        self._one_pass = graph.num_states <= ONE_PASS_STATES
        self._stopped_at = torch.zeros(graph.num_states, dtype=torch.bool)
        self._trajectories, self._seconds, self._loss = 0, 0.0, 0.0

    def step(self, progress: float) -> None:
        """Samples a batch and learns from it; `progress` is the share of training done."""
        began = time.perf_counter()
        training = self._training
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (1 - progress)
        with nullcontext() if self._one_pass else torch.no_grad():
            table = self._policy()
        rollouts = self._sampler.sample(
            table.log_pf, training.batch_size, exploration=training.exploration * (1 - progress)
        )
        self._stopped_at[rollouts.state.gather(1, rollouts.length[:, None])] = True
        if training.cut_off_share > 0:
            rollouts = self._sampler.cut_off(rollouts, training.cut_off_share)
        row = rollouts.state
        if not self._one_pass:
            visited, row = rollouts.state.unique(return_inverse=True)
            table = self._policy(visited)
        loss = batch_loss(
            training.loss,
            loss_inputs(table, row, self._log_reward, rollouts),
            log_z=self._policy.log_z,
            subtb_lambda=training.subtb_lambda,
        )
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._trajectories += training.batch_size
        self._loss = float(loss.detach())
        self._seconds += time.perf_counter() - began

    def measure(self) -> Measured:
        """Returns what the policy is now."""
        graph = self._graph
        with torch.no_grad():
            reached = outcome_distribution(graph, self._policy().log_pf)
        found = graph.is_mode & (graph.per_outcome(self._stopped_at) > 0)
        return Measured(
            trajectories=self._trajectories,
            total_variation=total_variation(reached, graph.target),
            jensen_shannon=jensen_shannon(reached, graph.target),
            modes=int(found.sum()),
            loss=self._loss,
            seconds=self._seconds,
        )
