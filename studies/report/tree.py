"""The tree of action sequences that were sampled on one instance, beside the target R^β / Z.

Target flows (P_B = 1, so a state's flow is the sum over the leaves below it):

    F(z⊤) = R(z)^β        F(z) = Σ_a F(za)        P*(a | z) = F(za) / F(z)        F(root) = Z
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gflowvlm.envs.base import TaskEnv
from gflowvlm.evaluation.metrics import total_variation
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import Step, Trajectory, Validity

MAX_STATES = 20_000
"""States of the largest tree that is walked for its flows."""

Path = tuple[str, ...]
"""A sequence of actions, the stop action included."""

MALFORMED = "(malformed)"


@dataclass(frozen=True)
class Target:
    """R^β / Z of one instance.

    Attributes:
        outcomes: Probability of every outcome.
        flows: F(z) / Z of every state and leaf by its actions; None where the tree is too large to be walked.
    """

    outcomes: Mapping[str, float]
    flows: Mapping[Path, float] | None


class Targets:
    """Computes the targets of a run's instances; what a task cannot tell it is asked only once.

    Args:
        env: An environment of the run's task.
        reward_exponent: β.
    """

    def __init__(self, env: TaskEnv, reward_exponent: float) -> None:
        self._env = env
        self._beta = reward_exponent
        self._outcomes_known = True
        self._walkable = True

    def of(self, seed: int, split: str) -> Target | None:
        """Returns the target of an instance, None where there is none."""
        if not self._outcomes_known:
            return None
        self._env.reset(seed=seed, options={"split": split})
        outcomes = self._env.target_distribution(self._beta)
        if outcomes is None:
            self._outcomes_known = False
            return None
        flows = target_flows(self._env, self._beta) if self._walkable else None
        self._walkable = flows is not None
        return Target(outcomes, flows)


def target_flows(env: TaskEnv, reward_exponent: float) -> dict[Path, float] | None:
    """Returns F(z) / Z of every state and leaf by its actions; None beyond `MAX_STATES`.

    Args:
        env: The environment, reset to the instance, with a tree that can be walked.
        reward_exponent: β.
    """
    log_flows: dict[Path, float] = {}

    def log_flow(here: TaskEnv, path: Path) -> float:
        if len(log_flows) > MAX_STATES:
            return -math.inf
        log_flows[path] = 0.0
        if here.end is not None:
            log_flows[path] = reward_exponent * here.log_reward
        else:
            below = []
            for action in here.admissible_actions:
                after = here.branch()
                after.advance(action)
                below.append(log_flow(after, (*path, action)))
            most = max(below)
            if most > -math.inf:
                log_flows[path] = most + math.log(sum(math.exp(value - most) for value in below))
        return log_flows[path]

    log_z = log_flow(env, ())
    if len(log_flows) > MAX_STATES:
        return None
    return {path: math.exp(value - log_z) for path, value in log_flows.items()}


def sampled_tree(trajectories: Sequence[Trajectory], target: Target | None) -> dict[str, Any]:
    """Returns the tree of one instance and its outcomes, as the page shows them.

    Shares are of the policy's trajectories; the expert's are counted by themselves.

    Keys: ``instance``, ``sampled`` (trajectories of the policy), ``versions`` (that made them), ``total_variation``
    (sampled outcomes to the target; None where unknown), ``outcomes`` (``name``, ``share``, ``target``) and ``rows``,
    depth first: ``depth``, ``action``, ``count``, ``expert`` (trajectories through here), ``share`` (of all sampled),
    ``target`` (F(z) / Z), ``policy`` (mean P(action | state, thoughts) of the sampler), ``target_policy`` (P*(a | z)),
    ``ends`` (trajectories that ended here: ``end``, ``log_reward``, ``outcome``, ``success``, or None).
    """
    policy = [t for t in trajectories if not t.expert]
    counts = Counter(t.outcome for t in policy)
    known = target is not None and len(policy) > 0
    distance = total_variation(counts, target.outcomes) if target is not None and known else None
    names = sorted({*counts, *(target.outcomes if target is not None else ())}, key=_natural)
    return {
        "instance": trajectories[0].instance_id,
        "sampled": len(policy),
        "versions": sorted({step.policy_version for t in policy for step in t.steps}),
        "total_variation": distance,
        "outcomes": [
            {
                "name": name,
                "share": counts[name] / len(policy) if policy else None,
                "target": None if target is None else target.outcomes.get(name, 0.0),
            }
            for name in names
        ],
        "rows": _rows(trajectories, len(policy), None if target is None else target.flows),
    }


def _rows(trajectories: Sequence[Trajectory], sampled: int, flows: Mapping[Path, float] | None) -> list[dict[str, Any]]:
    through: dict[Path, list[Trajectory]] = defaultdict(list)
    steps: dict[Path, list[Step]] = defaultdict(list)
    children: dict[Path, dict[str, None]] = defaultdict(dict)
    ended: dict[Path, Trajectory] = {}
    for trajectory in trajectories:
        path: Path = ()
        through[path].append(trajectory)
        for step in trajectory.steps:
            action = _named(step)
            children[path][action] = None
            path = (*path, action)
            through[path].append(trajectory)
            if not trajectory.expert:
                steps[path].append(step)
        ended[path] = trajectory
    if flows is not None:
        for path in flows:
            if len(path) > 0 and len(children.get(path[:-1], {})) > 0:
                children[path[:-1]].setdefault(path[-1], None)

    rows: list[dict[str, Any]] = []

    def add(path: Path) -> None:
        here = through.get(path, [])
        count = sum(not t.expert for t in here)
        flow = None if flows is None else flows.get(path, 0.0)
        above = None if flows is None or len(path) == 0 else flows.get(path[:-1], 0.0)
        given = [p for step in steps.get(path, []) if (p := action_probability(step)) is not None]
        end = ended.get(path)
        rows.append(
            {
                "depth": len(path),
                "action": path[-1] if path else "start",
                "count": count,
                "expert": len(here) - count,
                "share": count / sampled if sampled > 0 else None,
                "target": flow,
                "policy": sum(given) / len(given) if given else None,
                "target_policy": flow / above if flow is not None and above is not None and above > 0 else None,
                "ends": None
                if end is None
                else {
                    "end": end.end.value,
                    "log_reward": end.log_rewards[-1],
                    "outcome": end.outcome,
                    "success": end.success,
                },
            }
        )
        for action in sorted(children.get(path, {}), key=lambda a: (a == DONE_TOKEN, _natural(a))):
            add((*path, action))

    add(())
    return rows


def action_probability(step: Step) -> float | None:
    """Returns the sampler's P(action | state, thoughts) of a response; None where it has no sampled action tokens."""
    log_probs = step.sampler_log_probs[step.cot_end : step.action_end]
    if len(log_probs) == 0 or any(math.isnan(value) for value in log_probs):
        return None
    return math.exp(sum(log_probs))


def _named(step: Step) -> str:
    if step.action is None:
        return MALFORMED
    return step.action if step.validity is Validity.VALID else f"{step.action} (inadmissible)"


def _natural(text: str) -> tuple[bool, float, str]:
    """Sorts numbers by value, before all other text."""
    try:
        value = float(text)
    except ValueError:
        return (True, 0.0, text)
    return (True, 0.0, text) if math.isnan(value) else (False, value, text)
