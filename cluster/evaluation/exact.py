"""The policy's exact distribution over action sequences, against R^beta / Z and against what training aims at.

The tree of action sequences is expanded and scored by the policy. At each state the probabilities of the
actions are marginalised over chains of thought: those that the task's demonstrations use, and where these leave
much out, those that the policy says in `THOUGHT_SAMPLES` responses sampled there.

    P(a | z) = Σ_c P_CoT(c | z) P_Act(a | c, z)

Each chain of thought counts once and with its exact probability, wherever it is from. What they leave out
(1 − Σ_c P_CoT) is *uncovered*: rare other words for the same, misreadings, malformed text. So are states that are
hardly ever come to, where only the others are scored. Uncovered mass is followed to no end, counts as missing in
the distances, and is reported beside them: a distance is known to within it, and there is no other sampling error.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cluster.evaluation.action_tree import TreeState
from learner.packing import ScoredStep
from learner.scoring import LOG_STOP, Scorer
from shared.policy_inputs import PolicyInputs
from shared.response import DONE_TOKEN, parse_response, token_spans

LEFT_OUT = 0.01
"""Probability that an evaluation does not follow to its end: the rarest of thousands of states."""

THOUGHT_SAMPLES = 16
"""Responses that are sampled at a state whose demonstrations leave much out."""

MUCH = 1e-3
"""Uncovered probability, on the way to a state and there, from which on its thoughts are sampled."""

ThoughtSampler = Callable[[Sequence[TreeState]], Sequence[Sequence[str]]]
"""Samples responses at states: `THOUGHT_SAMPLES` of each."""

_STATES_AT_ONCE = 32
_INVALID = "invalid"


@dataclass(frozen=True)
class ActionProbabilities:
    """P(a | z) of one state; what is missing to 1 is `uncovered` or goes to inadmissible actions.

    Attributes:
        of: By action, the stop action included.
        uncovered: 1 − Σ_c P_CoT(c | z); 1 where the state was left out.
        thoughts: P_CoT(c | z) of every chain of thought.
    """

    of: Mapping[str, float]
    uncovered: float
    thoughts: Sequence[float] = ()


@dataclass(frozen=True)
class ExactMatch:
    """Distances of the policy's exact distribution to R^beta / Z and to what training aims at.

    Those of one instance, or the mean over several.

    Attributes:
        states: States of the tree.
        success: Probability of a successful end.
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


def action_probabilities(
    states: Sequence[TreeState],
    scorer: Scorer,
    inputs: PolicyInputs,
    advance: Callable[[float], None],
    left_out: float = 0.0,
    sample_thoughts: ThoughtSampler | None = None,
) -> list[ActionProbabilities | None]:
    """Returns P(a | z) of every state, None where stopping is forced.

    The states that the policy comes to most often are scored first; it ends when those that are left have
    no more than `left_out` of the probability together. Their mass counts as uncovered.

    Args:
        states: The states of a tree, the root first.
        scorer: Scorer of the policy.
        inputs: The policy's processor.
        advance: Called with the probability that was followed to its end since the last call, 1 in all.
        left_out: Probability that may be left.
        sample_thoughts: Samples more chains of thought where the demonstrations leave much out.
    """
    by_actions = {state.actions: number for number, state in enumerate(states)}
    found: list[ActionProbabilities | None] = [
        None if state.forced else ActionProbabilities({}, uncovered=1.0) for state in states
    ]
    waiting: dict[tuple[str, ...], float] = {(): 1.0} if not states[0].forced else {}
    left = 1.0
    while sum(waiting.values()) > left_out:
        chosen = sorted(waiting, key=lambda actions: -waiting[actions])[:_STATES_AT_ONCE]
        some = [states[by_actions[actions]] for actions in chosen]
        covered = state_probabilities(some, [waiting[actions] for actions in chosen], scorer, inputs, sample_thoughts)
        for state, given in zip(some, covered, strict=True):
            found[by_actions[state.actions]] = given
            here = waiting.pop(state.actions)
            for action in state.responses:
                child = (*state.actions, action)
                if not states[by_actions[child]].forced:
                    waiting[child] = here * given.of[action]
        advance(left - sum(waiting.values()))
        left = sum(waiting.values())
    advance(left)
    return found


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
) -> ExactMatch:
    """Returns the distances between the policy's distribution and R^beta / Z.

    Terminal objects are action sequences (P_B = 1). Mass that the policy loses on the way, uncovered or
    inadmissible, is an outcome of its own, to which the target gives nothing.

    Args:
        states: The states of a tree, parents before children.
        probabilities: The policy's, of every state.
        reward_exponent: β.
        log_factors: log κ of every state; None where it is not known.
    """
    policy, uncovered = _policy_ends(states, probabilities)
    log_target = [reward_exponent * state.log_reward for state in states]
    outcomes, sequences = _distances(states, policy, log_target)
    aim_outcomes = aim_sequences = None
    if log_factors is not None:
        on_the_way: dict[tuple[str, ...], float] = {}
        for state, log_factor in zip(states, log_factors, strict=True):
            on_the_way[state.actions] = on_the_way.get(state.actions[:-1], 0.0) + log_factor
        log_aim = [r + on_the_way[s.actions] for r, s in zip(log_target, states, strict=True)]
        aim_outcomes, aim_sequences = (distances[0] for distances in _distances(states, policy, log_aim))
    return ExactMatch(
        states=len(states),
        success=sum(policy[state.actions] for state in states if state.solved),
        total_variation=outcomes[0],
        jensen_shannon=outcomes[1],
        sequence_total_variation=sequences[0],
        sequence_jensen_shannon=sequences[1],
        aim_total_variation=aim_outcomes,
        aim_sequence_total_variation=aim_sequences,
        uncovered=uncovered,
    )


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


def _distances(
    states: Sequence[TreeState], policy: Mapping[tuple[str, ...], float], log_weights: Sequence[float]
) -> list[tuple[float, float]]:
    """Returns total variation and Jensen–Shannon divergence to exp(log_weights), over outcomes and over sequences."""
    weights = torch.tensor(log_weights, dtype=torch.float64).softmax(dim=0).tolist()
    target = {s.actions: p for s, p in zip(states, weights, strict=True)}
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


def _scored_step(state: TreeState, response: str, inputs: PolicyInputs) -> ScoredStep:
    ids = inputs.encode_response(response)
    spans = token_spans(ids, parse_response(response).action_chars, inputs.decode)
    return ScoredStep(state.prompt, state.image, ids, spans.cot_end, spans.action_end)


def state_probabilities(
    states: Sequence[TreeState],
    reach: Sequence[float],
    scorer: Scorer,
    inputs: PolicyInputs,
    sample_thoughts: ThoughtSampler | None,
) -> list[ActionProbabilities]:
    """Returns P(a | z) of each state: over its demonstrated chains of thought, and over sampled ones where those
    leave much out.

    Args:
        states: The states.
        reach: How probable it is to come to each of them.
        scorer: Scorer of the policy.
        inputs: The policy's processor.
        sample_thoughts: Samples responses; None for none.
    """
    found = _scored(states, [state.responses for state in states], scorer, inputs)
    unsure = [n for n, given in enumerate(found) if reach[n] * given.uncovered > MUCH]
    if sample_thoughts is not None and unsure:
        some = [states[n] for n in unsure]
        sampled = zip(some, sample_thoughts(some), strict=True)
        more = [_other_responses(state, texts, inputs) for state, texts in sampled]
        for n, given in zip(unsure, _scored(some, more, scorer, inputs), strict=True):
            found[n] = _together(found[n], given)
    return found


def _other_responses(state: TreeState, texts: Sequence[str], inputs: PolicyInputs) -> dict[str, list[str]]:
    """Returns responses with each action behind each chain of thought of `texts` that is not demonstrated."""
    found: dict[str, list[str]] = {action: [] for action in state.responses}
    known = {_parts(response)[0] for response in next(iter(state.responses.values()))}
    for text in texts:
        thought, rest = _parts(text)
        # Text that comes back otherwise from its tokens has no probability of its own.
        if rest and thought not in known and inputs.decode(inputs.encode_response(text)) == text:
            known.add(thought)
            for action, responses in found.items():
                responses.append(thought + action + rest)
    return found


def _parts(response: str) -> tuple[str, str]:
    """Returns what stands before a response's action and what behind it; nothing behind it where there is none."""
    chars = parse_response(response).action_chars
    return (response, "") if chars is None else (response[: chars[0]], response[chars[1] :])


def _scored(
    states: Sequence[TreeState],
    responses: Sequence[Mapping[str, Sequence[str]]],
    scorer: Scorer,
    inputs: PolicyInputs,
) -> list[ActionProbabilities]:
    """Sums over chains of thought; each of a state's has one response for every action."""
    steps, owners = [], []
    for number, (state, by_action) in enumerate(zip(states, responses, strict=True)):
        for action, texts in by_action.items():
            for text in texts:
                steps.append(_scored_step(state, text, inputs))
                owners.append((number, action))
    scores = torch.zeros(len(steps), LOG_STOP + 1)
    with torch.no_grad():
        for batch in scorer.pack(steps):
            scores[batch.index] = scorer.score_steps(batch).stacked()[:, : LOG_STOP + 1].cpu()
    of: list[dict[str, float]] = [defaultdict(float) for _ in states]
    thoughts: list[list[float]] = [[] for _ in states]
    for (number, action), (act, cot, stop) in zip(owners, scores.double().exp().tolist(), strict=True):
        of[number][action] += cot * act
        # A chain of thought says the same about stopping each time.
        of[number][DONE_TOKEN] += cot * stop / len(responses[number])
        if action == next(iter(responses[number])):
            thoughts[number].append(cot)
    return [ActionProbabilities(dict(p), _left(said), tuple(said)) for p, said in zip(of, thoughts, strict=True)]


def _together(one: ActionProbabilities, other: ActionProbabilities) -> ActionProbabilities:
    thoughts = (*one.thoughts, *other.thoughts)
    of = {action: one.of.get(action, 0.0) + other.of.get(action, 0.0) for action in {*one.of, *other.of}}
    return ActionProbabilities(of, _left(thoughts), thoughts)


def _left(thoughts: Sequence[float]) -> float:
    return max(0.0, 1.0 - math.fsum(thoughts))


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
