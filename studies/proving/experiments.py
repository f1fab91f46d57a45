"""What is tried on which problem, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gflowvlm.learner.losses import LOSSES
from gflowvlm.studies.proving.hypergrid import hypergrid, path_tree
from gflowvlm.studies.proving.state_graph import StateGraph
from gflowvlm.studies.proving.training import Training
from gflowvlm.studies.proving.walks import walk_tree

PROBLEMS: dict[str, Callable[[], StateGraph]] = {
    "grid-8x8": lambda: hypergrid(2, 8),
    "grid-8x8x8x8": lambda: hypergrid(4, 8),
    "additive-8x8": lambda: hypergrid(2, 8, reward="additive"),
    "additive-far-8x8": lambda: hypergrid(2, 8, reward="additive-far"),
    "additive-far-16x16": lambda: hypergrid(2, 16, reward="additive-far"),
    "grid-7x7": lambda: hypergrid(2, 7),
    "paths-7x7": lambda: path_tree(2, 7),
    "bonus-paths-7x7": lambda: path_tree(2, 7, reward="bonus"),
    "bonus-paths-7x7-cell-only": lambda: path_tree(2, 7, reward="bonus", sees_path=False),
    "walks": walk_tree,
}
"""Name -> state graph with a known R/Z; see the modules `hypergrid` and `walks` of this folder."""


@dataclass(frozen=True)
class Case:
    """One policy to train, with several seeds.

    Attributes:
        experiment: Name of the experiment.
        label: What tells it from the experiment's other cases.
        problem: Name in `PROBLEMS`.
        training: How it is trained.
    """

    experiment: str
    label: str
    problem: str
    training: Training


@dataclass(frozen=True)
class Experiment:
    """Cases that answer one question.

    Attributes:
        question: What is compared.
        cases: In the order of the table.
    """

    question: str
    cases: tuple[Case, ...]


GRID = Training("tb", trajectories=4_000)
LARGE_GRID = Training("tb", trajectories=64_000, batch_size=32, learning_rate=1e-2, log_z_learning_rate=0.1, hidden=64)
PATHS = Training("tb", trajectories=16_000, batch_size=32, learning_rate=1e-2, hidden=64)
WALKS = Training("tb", batch_size=32, learning_rate=3e-3, log_z_learning_rate=0.1, hidden=64, exploration=0.0)

LAMBDAS = (0.1, 0.5, 0.9, 1.0, 2.0)
CUT_OFF_SHARES = (0.0, 0.75, 1.0)
WALK_STEPS = {"short": 60, "long": 1000}
"""Steps of a training; the short one has as many as the default preset."""


def _losses() -> list[Case]:
    return [Case("losses", loss, "grid-8x8", replace(GRID, loss=loss)) for loss in LOSSES]


def _losses_4d() -> list[Case]:
    return [Case("losses-4d", loss, "grid-8x8x8x8", replace(LARGE_GRID, loss=loss)) for loss in LOSSES]


def _lambda() -> list[Case]:
    return [
        Case("lambda", f"{loss}, λ = {value:g}", "grid-8x8", replace(GRID, loss=loss, subtb_lambda=value))
        for loss in ("subtb", "flow_subtb")
        for value in LAMBDAS
    ]


def _forward_looking() -> list[Case]:
    trajectories = {"additive-8x8": 4_000, "additive-far-8x8": 4_000, "additive-far-16x16": 16_000}
    return [
        Case("forward-looking", f"{loss}, {problem}", problem, replace(GRID, loss=loss, trajectories=count))
        for problem, count in trajectories.items()
        for loss in ("flow_db", "fl_db", "flow_subtb", "fl_subtb")
    ]


def _incomplete() -> list[Case]:
    cases = []
    for share in CUT_OFF_SHARES:
        # Without any complete trajectory only the losses that read the reward at every state have a signal.
        names = ("db", "subtb") if share == 1 else ("tb", "db", "subtb", "flow_subtb", "fl_db", "fl_subtb")
        cases += [
            Case(
                "incomplete", f"{loss}, {share:.0%} cut off", "grid-8x8", replace(GRID, loss=loss, cut_off_share=share)
            )
            for loss in names
        ]
    return cases


def _tree() -> list[Case]:
    kinds = {
        "grid, uniform P_B": ("grid-7x7", PATHS),
        "grid, learned P_B": ("grid-7x7", replace(PATHS, learned_backward=True)),
        "paths": ("paths-7x7", PATHS),
        "path-dependent reward, sees the path": ("bonus-paths-7x7", PATHS),
        "path-dependent reward, sees the cell only": ("bonus-paths-7x7-cell-only", PATHS),
    }
    return [
        Case("tree", f"{loss}, {kind}", problem, replace(training, loss=loss))
        for kind, (problem, training) in kinds.items()
        for loss in ("var_tb", "subtb")
    ]


def _walks() -> list[Case]:
    return [
        Case(
            "walks",
            f"{loss}, {kind}",
            "walks",
            replace(WALKS, loss=loss, trajectories=steps * WALKS.batch_size),
        )
        for kind, steps in WALK_STEPS.items()
        for loss in LOSSES
    ]


EXPERIMENTS: dict[str, Experiment] = {
    "losses": Experiment("every loss on the 8×8 grid", tuple(_losses())),
    "losses-4d": Experiment("every loss on the 8×8×8×8 grid", tuple(_losses_4d())),
    "lambda": Experiment("SubTB(λ) for several λ, 8×8", tuple(_lambda())),
    "forward-looking": Experiment("forward-looking against plain flows, additive energy", tuple(_forward_looking())),
    "incomplete": Experiment("trajectories cut off before their end, 8×8", tuple(_incomplete())),
    "tree": Experiment("Markovian against non-Markovian states, 7×7", tuple(_tree())),
    "walks": Experiment("NumberLine's own tree of walks, from a weak player on", tuple(_walks())),
}
"""Name -> experiment."""


QUICK_TRAJECTORIES = 4_000
"""Enough for the 8×8 grids."""


def quick(case: Case) -> Case:
    """Returns the case with at most `QUICK_TRAJECTORIES`: too few to judge a loss by on the larger problems."""
    training = case.training
    return replace(case, training=replace(training, trajectories=min(training.trajectories, QUICK_TRAJECTORIES)))
