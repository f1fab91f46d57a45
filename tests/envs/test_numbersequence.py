"""NumberSequence: rules, instances, what is right, rewards, pictures."""

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from gflowvlm.envs.numbersequence import rendering, sequences
from gflowvlm.envs.numbersequence.environment import NumberSequenceEnv
from gflowvlm.envs.numbersequence.settings import NumberSequenceSettings
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason
from tests.envs.contract import endings
from tests.shared.json_answers import parse_response


def started(prefix: tuple[int, ...], **changes: object) -> NumberSequenceEnv:
    """Returns an environment at a chosen prefix."""
    env = NumberSequenceEnv(NumberSequenceSettings.model_validate(changes))
    env.reset(seed=0)
    env.prefix = prefix
    env._picture = None
    return env


@pytest.mark.parametrize(
    ("numbers", "following"),
    [
        ((1, 2, 3), {"step": 4, "sum": 5}),
        ((4, 8, 12), {"step": 16, "sum": 20}),
        ((3, 5, 7), {"step": 9}),
        ((2, 3, 5), {"sum": 8}),
        ((5, 1, 6), {"sum": 7}),
        ((1, 2, 3, 4), {"step": 5}),
        ((1, 2, 3, 5), {"sum": 8}),
        ((1, 2, 4), {}),
        ((1, 2, 3, 6), {}),
    ],
)
def test_next_numbers_are_those_of_the_rules_that_the_whole_sequence_obeys(
    numbers: tuple[int, ...], following: dict[str, int]
) -> None:
    assert sequences.next_by_rule(numbers) == following


def test_instances_are_of_every_kind_and_splits_share_none() -> None:
    env = NumberSequenceEnv()
    prefixes: dict[str, Counter[tuple[int, ...]]] = {"id": Counter(), "ood": Counter()}
    for split, (low, high) in {"id": (1, 9), "ood": (10, 19)}.items():
        kinds = Counter()
        for seed in range(2000):
            env.reset(seed=seed, options={"split": split})
            first, second, _ = env.prefix
            rules = sequences.next_by_rule(env.prefix)
            assert low <= first <= high
            assert low <= (second - first if "step" in rules else second) <= high
            kinds[tuple(rules)] += 1
            prefixes[split][env.prefix] += 1
        assert kinds["step", "sum"] / 2000 == pytest.approx(0.5, abs=0.05)
        assert kinds["step",] / 2000 == pytest.approx(0.25, abs=0.05)
        assert kinds["sum",] / 2000 == pytest.approx(0.25, abs=0.05)
    assert not set(prefixes["id"]) & set(prefixes["ood"])
    assert {(a, 2 * a, 3 * a) for a in range(1, 10)} <= set(prefixes["id"])
    assert len(prefixes["id"]) > 120


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_ambiguous_prefixes_is_as_set(share: float) -> None:
    env = NumberSequenceEnv(NumberSequenceSettings(ambiguous_share=share))
    for seed in range(300):
        env.reset(seed=seed, options={"split": ("id", "ood")[seed % 2]})
        assert len(sequences.next_by_rule(env.prefix)) == 1 + share


@pytest.mark.parametrize("choices", [2, 4, 12])
def test_admissible_numbers_are_distinct_larger_and_hold_both_rules_formulas(choices: int) -> None:
    env = NumberSequenceEnv(NumberSequenceSettings(choices=choices))
    places = Counter()
    for seed in range(300):
        env.reset(seed=seed, options={"split": ("id", "ood")[seed % 2]})
        *numbers, done = env.admissible_actions
        assert done == DONE_TOKEN
        values = [int(n) for n in numbers]
        assert values == sorted(set(values))
        assert len(values) == choices
        _, b, c = env.prefix
        assert {2 * c - b, b + c} <= set(values)
        assert min(values) > c
        places.update(values.index(n) for n in sequences.next_by_rule(env.prefix).values())
    assert set(places) >= set(range(min(choices, 8)))


@pytest.mark.parametrize(
    ("actions", "end", "success", "outcome", "rewards"),
    [
        (["4", DONE_TOKEN], EndReason.DONE, True, "4", [0, 1]),
        (["5", DONE_TOKEN], EndReason.DONE, True, "5", [0, 1]),
        ([DONE_TOKEN], EndReason.DONE, False, "unfinished", [0]),
        (["wrong"], EndReason.ENVIRONMENT, False, "wrong", [0]),
        (["4", "5"], EndReason.ENVIRONMENT, False, "wrong", [0, 0]),
        (["4", "six"], EndReason.INVALID, False, "invalid", [0, 0]),
    ],
)
def test_episode_ends_as_documented(
    actions: list[str], end: EndReason, success: bool, outcome: str, rewards: list[int]
) -> None:
    env = started((1, 2, 3))
    wrong = next(a for a in env.admissible_actions if a not in ("4", "5", DONE_TOKEN))
    found = [env.step(wrong if action == "wrong" else action)[1] for action in actions]
    assert (env.end, env.success, env.outcome, found) == (end, success, outcome, rewards)
    assert np.exp(env.log_reward) == pytest.approx(100.0 if success else 1.0)


def test_a_right_continuation_follows_one_rule_throughout() -> None:
    for following, success in (("4 5", True), ("5 8", True), ("5 7", False), ("4 7", False)):
        env = started((1, 2, 3), continuation=2)
        for number in following.split():
            assert number in env.admissible_actions
            assert env.log_reward == 0.0
            env.step(number)
        if success:
            env.step(DONE_TOKEN)
        assert env.success == success
        assert env.outcome == (following if success else "wrong")


@pytest.mark.parametrize("continuation", [1, 2, 3])
def test_successful_action_sequences_are_the_right_continuations(continuation: int) -> None:
    env = NumberSequenceEnv(NumberSequenceSettings(continuation=continuation, choices=3, image_size=32))
    for seed in range(12):
        env.reset(seed=seed)
        rules = len(sequences.next_by_rule(env.prefix))
        solved = {tuple(e.past_actions) for e in endings(env, seed, "id") if e.success}
        assert len(solved) == rules
        assert all(len(numbers) == continuation for numbers in solved)


def test_target_is_even_between_the_right_continuations() -> None:
    env = next(e for e in _reset_environments() if len(sequences.next_by_rule(e.prefix)) == 2)
    # One leaf for stopping at once, two for wrong numbers, and four for one number too many after either right one.
    z = 2 * 100 + 1 + 2 + 2 * 4
    target = env.target_distribution(1.0)
    assert target is not None
    right = [str(n) for n in sequences.next_by_rule(env.prefix).values()]
    expected = {right[0]: 100 / z, right[1]: 100 / z, "unfinished": 1 / z, "wrong": 10 / z}
    assert target == pytest.approx(expected)
    assert env.target_success(1.0) == pytest.approx(200 / z)


def _reset_environments() -> list[NumberSequenceEnv]:
    environments = [NumberSequenceEnv() for _ in range(20)]
    for seed, env in enumerate(environments):
        env.reset(seed=seed)
    return environments


def test_expert_solves_every_instance_and_follows_either_rule() -> None:
    env = NumberSequenceEnv(NumberSequenceSettings(continuation=2))
    followed: dict[tuple[int, ...], set[str]] = {}
    for seed in range(400):
        env.reset(seed=seed, options={"split": ("id", "ood")[seed % 2]})
        while env.end is None:
            env.step(env.expert_action())
        assert env.success
        assert env.end is EndReason.DONE
        followed.setdefault(env.prefix, set()).add(env.outcome)
    assert followed[1, 2, 3] == {"4 5", "5 8"}


def test_history_tells_past_sequences_but_not_the_current_one() -> None:
    env = started((11, 22, 33), continuation=2)
    assert "22" not in env.prompt()
    env.step("44")
    assert "State 0: 11 22 33 Action 0: 44\nState 1: picture\n" in env.prompt()


@pytest.mark.parametrize(
    ("prefix", "action", "fields", "words"),
    [
        ((1, 2, 3), "4", {"sequence": "1 2 3", "missing": 1}, ["steps of 1 and sums of two"]),
        ((3, 5, 7), "9", {"sequence": "3 5 7", "missing": 1}, ["steps of 2", "2 more each time"]),
        ((2, 3, 5), "8", {"sequence": "2 3 5", "missing": 1}, ["sums of two"]),
    ],
)
def test_demonstrations_read_the_sequence_and_name_the_rules_that_fit(
    prefix: tuple[int, ...], action: str, fields: dict[str, object], words: list[str]
) -> None:
    env = started(prefix)
    parsed = [parse_response(text) for text in env.demonstrations(action)]
    assert all(p.fields == fields for p in parsed)
    assert set(words) <= {p.thoughts for p in parsed}
    assert all(action not in p.thoughts for p in parsed)
    env.step(action)
    after = [parse_response(text) for text in env.demonstrations(DONE_TOKEN)]
    assert all(p.fields == {"sequence": fields["sequence"] + f" {action}", "missing": 0} for p in after)  # type: ignore[operator]
    assert "no number is missing" in {p.thoughts for p in after}


@pytest.mark.parametrize("changes", [{"n_max": 12}, {"ood_low": 19}, {"max_steps": 1}])
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        NumberSequenceSettings.model_validate(changes)


@pytest.mark.parametrize("size", [64, 100, 336])
@pytest.mark.parametrize(("split", "continuation"), [("id", 1), ("ood", 1), ("ood", 5)])
def test_numbers_are_drawn_apart_from_each_other_and_inside_the_picture(
    size: int, split: str, continuation: int
) -> None:
    env = NumberSequenceEnv(NumberSequenceSettings(image_size=size, continuation=continuation, ood_high=99))
    columns = 2 if continuation == 1 else 3
    cell = size // columns
    for seed in range(15):
        env.reset(seed=seed, options={"split": split})
        while env.missing > 0:
            env.step(env.expert_action())
        grey = np.array(env.picture().convert("L"), dtype=int)
        ink = np.abs(grey - grey[0, 0]) > 60
        edges = [*range(0, columns * cell, cell), columns * cell - 1]
        assert not ink[:, edges].any(), f"seed {seed}: ink where two numbers meet"
        assert not ink[[0, -1]].any(), f"seed {seed}: ink on the border"
        for place in range(len(env.numbers)):
            row, column = divmod(place, columns)
            top = (size - -(-len(env.numbers) // columns) * cell) // 2 + row * cell
            assert ink[top : top + cell, column * cell : (column + 1) * cell].mean() > 0.02


def test_pictures_tell_numbers_and_missing_ones_apart_and_vary_in_looks() -> None:
    def same_looks(numbers: list[int], missing: int) -> bytes:
        return rendering.draw(numbers, missing, 64, np.random.default_rng(5)).tobytes()

    pictures = {same_looks([a, b, a + b], 1) for a in range(1, 10) for b in range(1, 10)}
    assert len(pictures) == 81
    assert same_looks([1, 2, 3], 1) != same_looks([1, 2, 3, 4], 0)
    looks = {rendering.draw([1, 2, 3], 1, 64, np.random.default_rng(s)).tobytes() for s in range(50)}
    assert len(looks) == 50
