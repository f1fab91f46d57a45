"""The policy's exact distribution over action sequences, against R^beta / Z.

The tree of action sequences is expanded and scored by the policy. At each state the probabilities of the
actions are marginalised over the chains of thought that the task's demonstrations use:

    P(a | z) = Σ_c P_CoT(c | z) P_Act(a | c, z)

What those chains of thought leave out (1 − Σ_c P_CoT) is *uncovered*: other words for the same, misreadings,
malformed text. So are states that are hardly ever come to, where only the others are scored. Uncovered mass is
followed to no end, counts as missing in the distances, and is reported beside them, so that a distance is known
to within it. Nothing is sampled, so there is no sampling error.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from envs.base import TaskEnv
from learner.scoring import LOG_STOP, ScoredStep, Scorer
from shared.policy_inputs import PolicyInputs
from shared.response import DONE_TOKEN, parse_response, token_spans

MAX_STATES = 20_000
"""Largest tree that is expanded: states of one instance."""

LEFT_OUT = 0.01
"""Probability that an evaluation does not follow to its end: the rarest of thousands of states."""

_STATES_AT_ONCE = 32
_INVALID = "invalid"


@dataclass(frozen=True)
class TreeState:
    """One state z of the tree: what the policy sees there, and what stopping there is worth.

    Attributes:
        actions: The actions that lead to it.
        prompt: The task's prompt.
        image: The encoded picture.
        responses: For every admissible action but the stop, the demonstrated responses that take it.
        log_reward: log R of stopping here, nats, before the exponent.
        outcome: Name of the outcome of stopping here.
        solved: Whether stopping here solves the task.
        forced: Whether stopping is the only move (the step limit).
    """

    actions: tuple[str, ...]
    prompt: str
    image: bytes
    responses: Mapping[str, Sequence[str]]
    log_reward: float
    outcome: str
    solved: bool
    forced: bool


@dataclass(frozen=True)
class ActionProbabilities:
    """P(a | z) of one state; what is missing to 1 is `uncovered` or goes to inadmissible actions.

    Attributes:
        of: By action, the stop action included.
        uncovered: 1 − Σ_c P_CoT(c | z); 1 where the state was left out.
    """

    of: Mapping[str, float]
    uncovered: float


@dataclass(frozen=True)
class ExactMatch:
    """Distances of the policy's exact distribution to R^beta / Z; one instance, or the mean over several.

    Attributes:
        states: States of the tree.
        success: Probability of a successful end.
        total_variation: Over outcomes; in [0, 1].
        jensen_shannon: Over outcomes, nats; at most ln 2.
        sequence_total_variation: Over action sequences, the terminal objects of the tree.
        sequence_jensen_shannon: Over action sequences, nats.
        uncovered: Probability that a chain of thought outside the demonstrations, or a state that was left
            out, comes up on the way.
    """

    states: float
    success: float
    total_variation: float
    jensen_shannon: float
    sequence_total_variation: float
    sequence_jensen_shannon: float
    uncovered: float

    def as_dict(self) -> dict[str, float]:
        """Returns the figures by name."""
        return asdict(self)


def tree_size(env: TaskEnv) -> int:
    """Returns how many states the tree of an instance has; counting ends beyond `MAX_STATES`.

    Where the task itself has no target distribution, its tree cannot be walked and counts as too large. `env` must
    have been reset to the instance.
    """
    if env.target_distribution(1.0) is None:
        return MAX_STATES + 1
    states, waiting = 0, [env]
    while len(waiting) > 0 and states <= MAX_STATES:
        states += 1
        waiting += _children(waiting.pop()).values()
    return states


def expand_tree(env: TaskEnv) -> list[TreeState]:
    """Returns all states of the tree of an instance, parents before children.

    Args:
        env: The environment, reset to the instance.
    """
    states: list[TreeState] = []
    waiting = deque([env])
    while waiting:
        here = waiting.popleft()
        forced = here.end is not None
        children = _children(here)
        waiting.extend(children.values())
        prompt, image = here.prompt(), here.image_png()
        responses = {action: here.demonstrations(action) for action in children}
        log_reward, outcome = here.log_reward, here.outcome
        if not forced:
            here = here.branch()
            here.advance(DONE_TOKEN)
        actions = tuple(here.past_actions)
        states.append(TreeState(actions, prompt, image, responses, log_reward, outcome, here.success, forced))
    return states


def action_probabilities(
    states: Sequence[TreeState],
    scorer: Scorer,
    inputs: PolicyInputs,
    advance: Callable[[float], None],
    left_out: float = 0.0,
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
        for state, given in zip(some, _scored(some, scorer, inputs), strict=True):
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


def exact_match(
    states: Sequence[TreeState], probabilities: Sequence[ActionProbabilities | None], reward_exponent: float
) -> ExactMatch:
    """Returns the distances between the policy's distribution and R^beta / Z.

    Terminal objects are action sequences (P_B = 1). Mass that the policy loses on the way, uncovered or
    inadmissible, is an outcome of its own, to which the target gives nothing.
    """
    reach: dict[tuple[str, ...], float] = {(): 1.0}
    policy: dict[tuple[str, ...], float] = {}
    success = uncovered = 0.0
    for state, given in zip(states, probabilities, strict=True):
        here = reach[state.actions]
        if given is None:
            stop = here
        else:
            stop = here * given.of.get(DONE_TOKEN, 0.0)
            uncovered += here * given.uncovered
            for action in state.responses:
                reach[(*state.actions, action)] = here * given.of.get(action, 0.0)
        policy[state.actions] = stop
        success += stop * state.solved
    log_weights = torch.tensor([reward_exponent * s.log_reward for s in states], dtype=torch.float64)
    target = {s.actions: p for s, p in zip(states, log_weights.softmax(dim=0).tolist(), strict=True)}
    ends = {s.actions: s.outcome for s in states}
    by_outcome = [_summed(p, ends) for p in (policy, target)]
    return ExactMatch(
        states=len(states),
        success=success,
        total_variation=_total_variation(*by_outcome),
        jensen_shannon=_jensen_shannon(*by_outcome),
        sequence_total_variation=_total_variation(policy, target),
        sequence_jensen_shannon=_jensen_shannon(policy, target),
        uncovered=uncovered,
    )


def mean_match(matches: Sequence[ExactMatch]) -> ExactMatch:
    """Returns the mean of each figure over instances."""
    rows = [match.as_dict() for match in matches]
    return ExactMatch(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def _children(env: TaskEnv) -> dict[str, TaskEnv]:
    """Returns copies of an environment after each of its moves, by move; none where stopping is forced."""
    children = {}
    if env.end is None:
        for action in env.admissible_actions:
            if action != DONE_TOKEN:
                children[action] = env.branch()
                children[action].advance(action)
    return children


def _scored_step(state: TreeState, response: str, inputs: PolicyInputs) -> ScoredStep:
    ids = inputs.encode_response(response)
    spans = token_spans(ids, parse_response(response).action_chars, inputs.decode)
    return ScoredStep(state.prompt, state.image, ids, spans.cot_end, spans.action_end)


def _scored(states: Sequence[TreeState], scorer: Scorer, inputs: PolicyInputs) -> list[ActionProbabilities]:
    """Sums over the chains of thought of each state."""
    steps, owners = [], []
    for number, state in enumerate(states):
        for action, responses in state.responses.items():
            for response in responses:
                steps.append(_scored_step(state, response, inputs))
                owners.append((number, action))
    scores = torch.zeros(len(steps), LOG_STOP + 1)
    with torch.no_grad():
        for batch in scorer.pack(steps):
            scores[batch.index] = scorer.score_steps(batch).stacked()[:, : LOG_STOP + 1].cpu()
    of: list[dict[str, float]] = [defaultdict(float) for _ in states]
    covered = [0.0] * len(states)
    for (number, action), (act, cot, stop) in zip(owners, scores.double().exp().tolist(), strict=True):
        of[number][action] += cot * act
        # Every chain of thought is there once for each action, and says the same about stopping each time.
        share = 1.0 / len(states[number].responses)
        of[number][DONE_TOKEN] += share * cot * stop
        covered[number] += share * cot
    return [ActionProbabilities(dict(p), max(0.0, 1.0 - mass)) for p, mass in zip(of, covered, strict=True)]


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
