"""The policy's exact probabilities of actions, at every state of the tree of action sequences.

The tree of action sequences is expanded and scored by the policy. At each state the probabilities of the
actions are marginalised over chains of thought: those that the task's demonstrations use, and where these leave
much out, those that the policy says in `THOUGHT_SAMPLES` responses sampled there.

    P(a | z) = Σ_c P_CoT(c | z) P_Act(a | c, z)

Each chain of thought counts once and with its exact probability, wherever it is from, and all actions and the stop
stand behind the very same tokens of it. What they leave out (1 − Σ_a P(a | z)) is *uncovered*: rare other words for
the same, misreadings, malformed text, inadmissible actions. So are states that are hardly ever come to, where only
the others are scored. Uncovered mass is followed to no end, counts as missing in
the distances, and is reported beside them: a distance is known to within it, and there is no other sampling error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gflowvlm.evaluation.action_tree import TreeState
from gflowvlm.learner.packing import ScoredStep
from gflowvlm.learner.scoring import LOG_STOP, Scorer
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN

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
    """P(a | z) of one state; what is missing to 1 is `uncovered`.

    Attributes:
        of: By action, the stop action included.
        uncovered: 1 − Σ_a P(a | z); 1 where the state was left out.
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


def _scored_step(state: TreeState, ids: list[int], inputs: PolicyInputs, with_stop: bool) -> ScoredStep:
    layout = inputs.read(ids).layout
    stop_ids = layout.stop_ids if with_stop else []
    return ScoredStep(state.prompt, state.image, ids, layout.cot_end, layout.action_end, stop_ids)


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
    found = _scored(states, [_thoughts(state, inputs) for state in states], scorer, inputs)
    unsure = [n for n, given in enumerate(found) if reach[n] * given.uncovered > MUCH]
    if sample_thoughts is not None and unsure:
        some = [states[n] for n in unsure]
        sampled = zip(some, sample_thoughts(some), strict=True)
        more = [_other_thoughts(state, texts, inputs) for state, texts in sampled]
        for n, given in zip(unsure, _scored(some, more, scorer, inputs), strict=True):
            found[n] = _together(found[n], given)
    return found


def _thoughts(state: TreeState, inputs: PolicyInputs) -> list[list[int]]:
    """Returns one response's tokens for each chain of thought that is demonstrated at a state."""
    return [inputs.encode_response(text) for text in next(iter(state.responses.values()), ())]


def _other_thoughts(state: TreeState, texts: Sequence[str], inputs: PolicyInputs) -> list[list[int]]:
    """Returns one response's tokens for each chain of thought of `texts` that is not demonstrated."""
    known = {_thought_of(ids, inputs) for ids in _thoughts(state, inputs)}
    found = []
    for text in texts:
        ids = inputs.encode_if_possible(text)
        # Text that comes back otherwise from its tokens has no probability of its own.
        if ids is not None and not inputs.read(ids).parsed.malformed:
            thought = _thought_of(ids, inputs)
            if thought not in known:
                known.add(thought)
                found.append(ids)
    return found


def _thought_of(ids: Sequence[int], inputs: PolicyInputs) -> tuple[int, ...]:
    return tuple(ids[: inputs.read(ids).layout.cot_end])


def _scored(
    states: Sequence[TreeState], thoughts: Sequence[Sequence[list[int]]], scorer: Scorer, inputs: PolicyInputs
) -> list[ActionProbabilities]:
    """Sums over chains of thought, each of them given by a response that has it."""
    steps: list[ScoredStep] = []
    owners: list[tuple[int, str, bool]] = []
    for number, (state, responses) in enumerate(zip(states, thoughts, strict=True)):
        for response in responses:
            # The stop and the chain of thought are scored once, with the first action.
            first = True
            for action in state.responses:
                ids = inputs.with_action(response, action)
                if ids is not None:
                    steps.append(_scored_step(state, ids, inputs, with_stop=first))
                    owners.append((number, action, first))
                    first = False
    scores = torch.zeros(len(steps), LOG_STOP + 1)
    with torch.no_grad():
        for batch in scorer.pack(steps):
            scores[batch.index] = scorer.score_steps(batch).stacked()[:, : LOG_STOP + 1].cpu()
    of: list[dict[str, float]] = [dict.fromkeys([*state.responses, DONE_TOKEN], 0.0) for state in states]
    said: list[list[float]] = [[] for _ in states]
    probabilities = scores.double().exp().tolist()
    for step, (number, action, first), (act, cot, stop) in zip(steps, owners, probabilities, strict=True):
        of[number][action] += cot * act
        if len(step.stop_ids) > 0:
            of[number][DONE_TOKEN] += cot * stop
        if first:
            said[number].append(cot)
    return [ActionProbabilities(p, _left(p), tuple(cots)) for p, cots in zip(of, said, strict=True)]


def _together(one: ActionProbabilities, other: ActionProbabilities) -> ActionProbabilities:
    of = {action: one.of[action] + other.of[action] for action in one.of}
    return ActionProbabilities(of, _left(of), (*one.thoughts, *other.thoughts))


def _left(of: Mapping[str, float]) -> float:
    return max(0.0, 1.0 - math.fsum(of.values()))
