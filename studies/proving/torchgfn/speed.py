"""Wall time to the same total variation on the 8×8 hypergrid: our proving ground against torchgfn.

Both train the same network (one trunk, same width, heads for P_F and log F) with the same batches, optimiser,
learning rates, exploration and schedules, those of `gflowvlm.studies.proving.experiments.GRID`; P_B is uniform. Both
are measured in the same way, exactly, and outside of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from gfn.estimators import DiscretePolicyEstimator, ScalarEstimator  # type: ignore[import-not-found]
from gfn.gflownet import (  # type: ignore[import-not-found]
    DBGFlowNet,
    GFlowNet,
    LogPartitionVarianceGFlowNet,
    ModifiedDBGFlowNet,
    SubTBGFlowNet,
    TBGFlowNet,
)
from gfn.gym import HyperGrid  # type: ignore[import-not-found]
from gfn.preprocessors import KHotPreprocessor  # type: ignore[import-not-found]
from gfn.utils.modules import MLP  # type: ignore[import-not-found]

from gflowvlm.studies.proving.experiments import GRID
from gflowvlm.studies.proving.hypergrid import hypergrid
from gflowvlm.studies.proving.state_graph import StateGraph, outcome_distribution, total_variation
from gflowvlm.studies.proving.torchgfn.report import Curve, TimedTraining, from_curve
from gflowvlm.studies.proving.training import Training, train

DIMENSIONS, SIDE = 2, 8

WARM_UP_STEPS = 5
"""Of each side before the clock counts."""


@dataclass(frozen=True)
class Counterpart:
    """torchgfn's class for one of our losses.

    Attributes:
        label: How it is called in the table.
        kind: The class.
        learns_flow: Whether it takes an estimator of log F.
        arguments: What else it is given.
    """

    label: str
    kind: type
    learns_flow: bool
    arguments: Mapping[str, object]


def counterparts(subtb_lambda: float) -> dict[str, Counterpart]:
    """Returns our loss -> torchgfn's; `subtb` has none there."""
    geometric = {"weighting": "geometric_within", "lamda": subtb_lambda}
    looking = {"forward_looking": True}
    return {
        "tb": Counterpart("TBGFlowNet", TBGFlowNet, False, {}),
        "var_tb": Counterpart("LogPartitionVarianceGFlowNet", LogPartitionVarianceGFlowNet, False, {}),
        "db": Counterpart("ModifiedDBGFlowNet", ModifiedDBGFlowNet, False, {}),
        "flow_db": Counterpart("DBGFlowNet", DBGFlowNet, True, {}),
        "flow_subtb": Counterpart("SubTBGFlowNet", SubTBGFlowNet, True, geometric),
        "fl_db": Counterpart("DBGFlowNet, forward_looking", DBGFlowNet, True, looking),
        "fl_subtb": Counterpart("SubTBGFlowNet, forward_looking", SubTBGFlowNet, True, geometric | looking),
    }


class TorchgfnTraining:
    """A training with torchgfn, in the way of its own examples.

    Args:
        counterpart: What is trained.
        training: Our settings; its loss is not looked at.
        seed: Of weights and sampling; sets torch's global generator.
    """

    def __init__(self, counterpart: Counterpart, training: Training, seed: int) -> None:
        torch.manual_seed(seed)
        self._training = training
        self._env = HyperGrid(ndim=DIMENSIONS, height=SIDE, store_all_states=True)
        self._gflownet = make_gflownet(self._env, counterpart, training.hidden)
        self._rates = (training.learning_rate, training.log_z_learning_rate)
        named = dict(self._gflownet.named_parameters())
        log_z = [named.pop("logZ")] if counterpart.kind is TBGFlowNet else []
        self._optimizer = torch.optim.Adam(
            [
                {"params": list(named.values()), "lr": self._rates[0]},
                {"params": log_z, "lr": self._rates[1]},
            ],
            fused=True,
        )

    def step(self, progress: float) -> None:
        """Samples a batch and learns from it; `progress` is the share of training done."""
        training = self._training
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (1 - progress)
        # Sampling without gradients and asking for P_F again is the quicker of torchgfn's two ways here.
        with torch.no_grad():
            trajectories = self._gflownet.sample_trajectories(
                self._env, n=training.batch_size, epsilon=training.exploration * (1 - progress)
            )
        loss = self._gflownet.loss_from_trajectories(self._env, trajectories, recalculate_all_logprobs=True)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    @torch.no_grad()
    def log_policy(self) -> torch.Tensor:
        """Returns (S, A+1) log P_F of all cells, the stop action last."""
        states, policy = self._env.all_states, self._gflownet.pf
        return policy.to_probability_distribution(states, policy(states)).logits


def make_gflownet(env: HyperGrid, counterpart: Counterpart, hidden: int) -> GFlowNet:
    """Returns a torchgfn GFlowNet whose networks have the size of `gflowvlm.studies.proving.policy.Policy`'s."""
    preprocessor = KHotPreprocessor(height=env.height, ndim=env.ndim)
    network = MLP(
        preprocessor.output_dim, env.n_actions, hidden_dim=hidden, n_hidden_layers=2, activation_fn="leaky_relu"
    )
    flow: dict[str, ScalarEstimator] = {}
    if counterpart.learns_flow:
        head = MLP(preprocessor.output_dim, 1, trunk=network.trunk)
        flow["logF"] = ScalarEstimator(head, preprocessor=preprocessor)
    return counterpart.kind(
        pf=DiscretePolicyEstimator(network, env.n_actions, preprocessor=preprocessor),
        pb=DiscretePolicyEstimator.uniform(env.n_actions, preprocessor=preprocessor),
        **flow,
        **counterpart.arguments,
    )


def torchgfn_curve(graph: StateGraph, counterpart: Counterpart, training: Training, seed: int) -> Curve:
    """Trains with torchgfn and returns its curve, measured where `gflowvlm.studies.proving.training.train` measures."""
    learner = TorchgfnTraining(counterpart, training, seed)
    steps = training.trajectories // training.batch_size
    measured_at = {round(steps * i / training.evaluations) for i in range(training.evaluations + 1)}
    curve, seconds = [], 0.0
    for step in range(steps + 1):
        if step in measured_at:
            reached = outcome_distribution(graph, learner.log_policy())
            curve.append((step * training.batch_size, seconds, total_variation(reached, graph.target)))
        if step < steps:
            began = time.perf_counter()
            learner.step(step / steps)
            seconds += time.perf_counter() - began
    return curve


def our_curve(graph: StateGraph, training: Training, seed: int) -> Curve:
    """Trains with our code and returns its curve."""
    return [(m.trajectories, m.seconds, m.total_variation) for m in train(graph, training, seed)]


def timed_trainings(seeds: int) -> Iterator[tuple[TimedTraining, TimedTraining]]:
    """Yields both trainings, ours first, of every loss with every seed, one thread and one training at a time."""
    graph = hypergrid(DIMENSIONS, SIDE)
    # torch's check of every distribution costs torchgfn time and finds nothing here.
    torch.distributions.Distribution.set_default_validate_args(False)
    for loss, counterpart in counterparts(GRID.subtb_lambda).items():
        training = replace(GRID, loss=loss)
        sides: dict[str, Callable[[Training, int], Curve]] = {
            "ours": partial(our_curve, graph),
            "torchgfn": partial(torchgfn_curve, graph, counterpart),
        }
        for curve in sides.values():
            curve(replace(training, trajectories=WARM_UP_STEPS * training.batch_size, evaluations=1), 0)
        for seed in range(seeds):
            # Whatever else the machine does meanwhile should not always meet the same side.
            order = list(sides) if seed % 2 == 0 else list(reversed(sides))
            curves = {side: sides[side](training, seed) for side in order}
            ours, theirs = (from_curve(loss, counterpart.label, side, seed, curves[side]) for side in sides)
            yield ours, theirs
