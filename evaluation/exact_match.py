"""The distance of a policy's distribution over action sequences to R^beta / Z and to what training aims at.

What training aims at
---------------------
With γ = `cot_weight` on log P_CoT and α = `reference_weight` on log P_ref, R^beta / Z is not where the losses have
their minimum. Every one of them (learner/targets.py) balances

    F(z) P_CoT(c | z)^γ P_Act(a | c, z) = P_ref(c | z)^α F(z'),   and R^beta in place of F(z') at the stop.

Summed over a, with G(z) = R(z⊤)^beta + Σ_a F(z'_a): F(z) P_CoT(c | z)^γ = P_ref(c | z)^α G(z). P_CoT is normalised, so

    F(z) = κ(z) G(z),   κ(z) = (Σ_c P_ref(c | z)^(α/γ))^γ,

and the policy at the minimum ends at a state z_n with probability ∝ R^beta Π_k κ(z_k) over the states it answered at.
α = γ gives κ = 1. With α > γ each further state costs −log κ nats. With α < γ the sum is over texts that nobody
demonstrated, and is not known here.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gflowvlm.evaluation.action_tree import TreeState
from gflowvlm.evaluation.exact import ActionProbabilities
from gflowvlm.shared.response import DONE_TOKEN

_INVALID = "invalid"


@dataclass(frozen=True)
class ExactMatch:
    """Distances of the policy's exact distribution to R^beta / Z and to what training aims at.

    Those of one instance, or the mean over several.

    Attributes:
        states: States of the tree.
        success: Probability of a successful end.
        div_at_n: Different successful sequences that N of the policy's trajectories are expected to hold, where they
            hold any: the Div@N of GFlowVLM without its sampling error.
        target_div_at_n: The same of R^beta / Z.
        aim_div_at_n: The same of what training aims at; None where that is not known.
        total_variation: Over outcomes; in [0, 1].
        jensen_shannon: Over outcomes, nats; at most ln 2.
        sequence_total_variation: Over action sequences, the terminal objects of the tree.
        sequence_jensen_shannon: Over action sequences, nats.
        aim_total_variation: To what training aims at, over outcomes; None where that is not known.
        aim_sequence_total_variation: The same over action sequences.
        uncovered: Probability that a chain of thought outside the demonstrations, or a state that was left
            out, comes up on the way.
    """

    states: float
    success: float
    div_at_n: float
    target_div_at_n: float
    aim_div_at_n: float | None
    total_variation: float
    jensen_shannon: float
    sequence_total_variation: float
    sequence_jensen_shannon: float
    aim_total_variation: float | None
    aim_sequence_total_variation: float | None
    uncovered: float

    def as_dict(self) -> dict[str, float | None]:
        """Returns the figures by name."""
        return asdict(self)


def log_thought_factors(
    reference: Sequence[ActionProbabilities | None], reference_weight: float, cot_weight: float
) -> list[float] | None:
    """Returns log κ(z) of every state, nats, 0 where stopping is forced; None where it is not known.

    Args:
        reference: The reference policy's probabilities, of every state of a tree.
        reference_weight: α.
        cot_weight: γ.
    """
    if reference_weight < cot_weight or cot_weight == 0:
        return None
    power = reference_weight / cot_weight
    if power == 1:
        return [0.0] * len(reference)
    sums = [1.0 if given is None else math.fsum(p**power for p in given.thoughts) for given in reference]
    # A reference policy that hardly ever says what is demonstrated says nothing here of what it does say.
    return None if min(sums) == 0 else [cot_weight * math.log(total) for total in sums]


def exact_match(
    states: Sequence[TreeState],
    probabilities: Sequence[ActionProbabilities | None],
    reward_exponent: float,
    log_factors: Sequence[float] | None,
    samples: int,
    log_reward_floor: float = -math.inf,
) -> ExactMatch:
    """Returns the distances between the policy's distribution and R^beta / Z.

    Terminal objects are action sequences (P_B = 1). Mass that the policy loses on the way, uncovered or
    inadmissible, is an outcome of its own, to which the target gives nothing.

    Args:
        states: The states of a tree, parents before children.
        probabilities: The policy's, of every state.
        reward_exponent: β.
        log_factors: log κ of every state; None where it is not known.
        samples: N of Div@N.
        log_reward_floor: Least β log R of what training aims at; R^beta / Z itself has none.
    """
    policy, uncovered = _policy_ends(states, probabilities)
    log_target = [reward_exponent * state.log_reward for state in states]
    target = _normalised(states, log_target)
    outcomes, sequences = _distances(states, policy, target)
    aim_outcomes = aim_sequences = aim_div = None
    if log_factors is not None:
        on_the_way: dict[tuple[str, ...], float] = {}
        for state, log_factor in zip(states, log_factors, strict=True):
            on_the_way[state.actions] = on_the_way.get(state.actions[:-1], 0.0) + log_factor
        ends = zip(log_target, states, strict=True)
        aim = _normalised(states, [max(r, log_reward_floor) + on_the_way[s.actions] for r, s in ends])
        aim_outcomes, aim_sequences = (distances[0] for distances in _distances(states, policy, aim))
        aim_div = _div_at_n(states, aim, samples)
    return ExactMatch(
        states=len(states),
        success=sum(policy[state.actions] for state in states if state.solved),
        div_at_n=_div_at_n(states, policy, samples),
        target_div_at_n=_div_at_n(states, target, samples),
        aim_div_at_n=aim_div,
        total_variation=outcomes[0],
        jensen_shannon=outcomes[1],
        sequence_total_variation=sequences[0],
        sequence_jensen_shannon=sequences[1],
        aim_total_variation=aim_outcomes,
        aim_sequence_total_variation=aim_sequences,
        uncovered=uncovered,
    )


def _div_at_n(states: Sequence[TreeState], ends: Mapping[tuple[str, ...], float], samples: int) -> float:
    """Returns E[S | S ≥ 1], S the number of different successful sequences among so many; 0 where there is none."""
    successful = [ends[state.actions] for state in states if state.solved]
    some = 1.0 - (1.0 - min(1.0, math.fsum(successful))) ** samples
    return math.fsum(1.0 - (1.0 - p) ** samples for p in successful) / some if some > 0 else 0.0


def _policy_ends(
    states: Sequence[TreeState], probabilities: Sequence[ActionProbabilities | None]
) -> tuple[dict[tuple[str, ...], float], float]:
    """Returns the probability of ending at each state, and the uncovered mass."""
    reach: dict[tuple[str, ...], float] = {(): 1.0}
    policy: dict[tuple[str, ...], float] = {}
    uncovered = 0.0
    for state, given in zip(states, probabilities, strict=True):
        here = reach[state.actions]
        if given is None:
            policy[state.actions] = here
        else:
            policy[state.actions] = here * given.of.get(DONE_TOKEN, 0.0)
            uncovered += here * given.uncovered
            for action in state.responses:
                reach[(*state.actions, action)] = here * given.of.get(action, 0.0)
    return policy, uncovered


def _normalised(states: Sequence[TreeState], log_weights: Sequence[float]) -> dict[tuple[str, ...], float]:
    """Returns exp(log_weights) as a distribution over sequences."""
    weights = torch.tensor(log_weights, dtype=torch.float64).softmax(dim=0).tolist()
    return {state.actions: p for state, p in zip(states, weights, strict=True)}


def _distances(
    states: Sequence[TreeState], policy: Mapping[tuple[str, ...], float], target: Mapping[tuple[str, ...], float]
) -> list[tuple[float, float]]:
    """Returns total variation and Jensen–Shannon divergence, over outcomes and over sequences."""
    ends = {s.actions: s.outcome for s in states}
    pairs = [(_summed(policy, ends), _summed(target, ends)), (policy, target)]
    return [(_total_variation(p, q), _jensen_shannon(p, q)) for p, q in pairs]


def mean_match(matches: Sequence[ExactMatch]) -> ExactMatch:
    """Returns the mean of each figure over instances."""
    rows = [match.as_dict() for match in matches]
    means: dict[str, Any] = {}
    for name in rows[0]:
        known = [value for row in rows if (value := row[name]) is not None]
        means[name] = sum(known) / len(rows) if len(known) == len(rows) else None
    return ExactMatch(**means)


def _summed(probabilities: Mapping[tuple[str, ...], float], name_of: Mapping[tuple[str, ...], str]) -> dict[Any, float]:
    summed: dict[Any, float] = defaultdict(float)
    for key, probability in probabilities.items():
        summed[name_of[key]] += probability
    return summed


def _with_missing(p: Mapping[Any, float]) -> dict[Any, float]:
    return {**p, _INVALID: p.get(_INVALID, 0.0) + max(0.0, 1.0 - sum(p.values()))}


def _total_variation(p: Mapping[Any, float], q: Mapping[Any, float]) -> float:
    p, q = _with_missing(p), _with_missing(q)
    return 0.5 * sum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in {*p, *q})


def _jensen_shannon(p: Mapping[Any, float], q: Mapping[Any, float]) -> float:
    p, q = _with_missing(p), _with_missing(q)

    def to_middle(a: Mapping[Any, float], b: Mapping[Any, float]) -> float:
        return sum(v * math.log(2 * v / (v + b.get(x, 0.0))) for x, v in a.items() if v > 0)

    return 0.5 * to_middle(p, q) + 0.5 * to_middle(q, p)
