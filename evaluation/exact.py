"""The policy's exact probabilities of actions, at every state of the tree of action sequences.

The tree of action sequences is expanded and scored by the policy. At each state the probabilities of the
actions are marginalised over chains of thought: those that the task's demonstrations use, and where these leave
much out, those that the policy says in `THOUGHT_SAMPLES` responses sampled there.

    P(a | z) = Σ_c P_CoT(c | z) P_Act(a | c, z)

Each chain of thought counts once and with its exact probability, wherever it is from. What they leave out
(1 − Σ_c P_CoT) is *uncovered*: rare other words for the same, misreadings, malformed text. So are states that are
hardly ever come to, where only the others are scored. Uncovered mass is followed to no end, counts as missing in
the distances, and is reported beside them: a distance is known to within it, and there is no other sampling error.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gflowvlm.evaluation.action_tree import TreeState
from gflowvlm.learner.packing import ScoredStep
from gflowvlm.learner.scoring import LOG_STOP, Scorer
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN, parse_response, token_spans

LEFT_OUT = 0.01
"""Probability that an evaluation does not follow to its end: the rarest of thousands of states."""

THOUGHT_SAMPLES = 16
"""Responses that are sampled at a state whose demonstrations leave much out."""

MUCH = 1e-3
"""Uncovered probability, on the way to a state and there, from which on its thoughts are sampled."""

ThoughtSampler = Callable[[Sequence[TreeState]], Sequence[Sequence[str]]]
"""Samples responses at states: `THOUGHT_SAMPLES` of each."""

_STATES_AT_ONCE = 32


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
