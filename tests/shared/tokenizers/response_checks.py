"""What must hold of responses whatever the tokenizer."""

from collections.abc import Iterable, Sequence
from itertools import permutations

import numpy as np

from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN


def check_round_trip(inputs: PolicyInputs, text: str, action: str) -> list[int]:
    """Checks that a demonstration comes back from its tokens, and returns these."""
    ids = inputs.encode_response(text)
    read = inputs.read(ids)
    assert read.text == inputs.decode(ids) == text
    assert read.parsed.action == action
    assert ids[-1] == inputs.end_id
    return ids


def check_actions(inputs: PolicyInputs, response: Sequence[int], actions: Iterable[str]) -> int:
    """Checks the actions that are admissible behind one chain of thought, given by a response with any of them.

    Returns:
        How many actions there are tokens for.
    """
    here = inputs.read(response).layout
    thought = list(response[: here.cot_end])
    assert len(here.stop_ids) > 0
    branches = {DONE_TOKEN: here.stop_ids}
    for action in actions:
        ids = inputs.with_action(response, action)
        assert ids is not None, action
        read = inputs.read(ids)
        assert read.parsed.action == action
        layout = read.layout
        # All actions and the stop begin at the same place of the same chain of thought.
        assert ids[: layout.cot_end] == thought
        assert layout.action_end > layout.cot_end
        if action == DONE_TOKEN:
            assert layout.stop_ids == ids[layout.cot_end : layout.action_end]
        if layout.stop_ids != here.stop_ids:
            # The tokens behind the value may differ, and with them those of the frame.
            assert inputs.decode(layout.stop_ids).rstrip('"}</') == inputs.decode(here.stop_ids).rstrip('"}</')
        if action != DONE_TOKEN:
            branches[action] = ids[layout.cot_end : layout.action_end]
    check_no_prefixes(branches)
    assert largest_mass(branches.values()) <= 1 + 1e-5
    return len(branches)


def largest_mass(branches: Iterable[Sequence[int]]) -> float:
    """Returns what the branches' probabilities add up to under a model that goes on as one of them as long as it can.

    1 where no branch begins another, and more where one does.
    """
    waiting, total = [(1.0, [tuple(branch) for branch in branches])], 0.0
    while waiting:
        here, among = waiting.pop()
        total += here * among.count(())
        following: dict[int, list[tuple[int, ...]]] = {}
        for branch in among:
            if branch:
                following.setdefault(branch[0], []).append(branch[1:])
        waiting += [(here / len(following), rest) for rest in following.values()]
    return total


def check_no_prefixes(branches: dict[str, list[int]]) -> None:
    """Checks that no branch begins another: then Σ P ≤ 1 under every model (Kraft), and only then."""
    for (one, short), (other, long) in permutations(branches.items(), 2):
        assert long[: len(short)] != short, (one, other, short, long)


def in_other_tokens(inputs: PolicyInputs, text: str, rng: np.random.Generator) -> list[int]:
    """Returns tokens of a text that are not the tokenizer's own: it is written piece by piece."""
    tokens = inputs._tokens
    ids: list[int] = []
    done, left = "", text
    while left:
        size = len(DONE_TOKEN) if left.startswith(DONE_TOKEN) else int(rng.integers(1, 5))
        if DONE_TOKEN in left[:size]:
            size = left.index(DONE_TOKEN) or len(DONE_TOKEN)
        written = tokens.continuation(ids, done, left[:size])
        if written is None:
            # No border can stand there.
            size = len(left)
            written = tokens.continuation(ids, done, left)
            assert written is not None, (done, left)
        ids += written
        done, left = done + left[:size], left[size:]
    assert inputs.decode(ids) == text
    return [*ids, inputs.end_id]
