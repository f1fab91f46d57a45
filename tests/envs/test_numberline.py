"""NumberLine: instances, moves, rewards, prompts, pictures."""

from collections.abc import Sequence

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason
from tests.shared.json_answers import parse_response


def started(start: int, target: int, split: str = "id", **changes: object) -> NumberLineEnv:
    """Returns an environment at a chosen start and target."""
    env = NumberLineEnv(NumberLineSettings.model_validate(changes))
    for seed in range(100_000):
        env.reset(seed=seed, options={"split": split})
        if (env.start, env.target) == (start, target):
            return env
    raise AssertionError("no seed gives this instance")


def rewards_of(env: TaskEnv, actions: Sequence[str]) -> list[float]:
    return [float(env.step(action)[1]) for action in actions]


def test_in_distribution_instances_cover_the_range_and_never_start_on_the_target() -> None:
    env = make_env(NumberLineSettings())
    assert isinstance(env, NumberLineEnv)
    seen = set()
    for seed in range(1000):
        env.reset(seed=seed)
        seen.add((env.start, env.target))
    assert seen == {(a, b) for a in range(6) for b in range(6) if a != b}


def test_out_of_distribution_instances_keep_range_and_distance() -> None:
    env = NumberLineEnv(NumberLineSettings(ood_low=10, ood_high=20, ood_max_distance=3))
    starts, targets = set(), set()
    for seed in range(500):
        env.reset(seed=seed, options={"split": "ood"})
        assert 1 <= abs(env.start - env.target) <= 3
        starts.add(env.start)
        targets.add(env.target)
    assert starts == targets == set(range(10, 21))


def test_walking_past_either_end_of_the_range_changes_nothing() -> None:
    env = started(0, 5)
    env.step("-")
    assert (env.current, env.end, env.past_actions) == (0, None, ["-"])
    env = started(50, 48, "ood")
    env.step("+")
    assert (env.current, env.end) == (50, None)


@pytest.mark.parametrize(
    ("start", "target", "actions", "rewards"),
    [
        (3, 5, ["+", "+", DONE_TOKEN], [0, 1, 1]),
        (3, 5, ["-", "+", DONE_TOKEN], [-1, 0, -1]),
        (0, 5, ["-"], [-1]),
        (3, 4, ["+", "+"], [1, -1]),
        (4, 5, ["+", "+"], [1, 1]),
        (4, 5, ["+", "what"], [1, -1]),
    ],
)
def test_original_reward_is_one_on_target_and_minus_one_for_no_progress(
    start: int, target: int, actions: list[str], rewards: list[float]
) -> None:
    assert rewards_of(started(start, target), actions) == rewards


def test_log_reward_is_that_of_the_paper_at_every_state() -> None:
    env = started(2, 5)
    found = [env.log_reward]
    for _ in range(3):
        env.step("+")
        found.append(env.log_reward)
    assert np.exp(found) == pytest.approx([25.0, 100 / 3, 50.0, 100.0])


@pytest.mark.parametrize(
    ("actions", "end", "success", "outcome", "terminated", "truncated"),
    [
        (["+", "+", DONE_TOKEN], EndReason.DONE, True, "5", True, False),
        (["+", DONE_TOKEN], EndReason.DONE, False, "4", True, False),
        (["+", "+", "left"], EndReason.INVALID, False, "invalid", True, False),
        (["+", "+", ""], EndReason.INVALID, False, "invalid", True, False),
        (["+", "-", "+", "+"], EndReason.STEP_LIMIT, True, "5", False, True),
        (["+", "-", "+", "-"], EndReason.STEP_LIMIT, False, "3", False, True),
    ],
)
def test_episode_ends_as_documented(
    actions: list[str], end: EndReason, success: bool, outcome: str, terminated: bool, truncated: bool
) -> None:
    env = started(3, 5, max_steps=4)
    for action in actions[:-1]:
        assert env.step(action)[2:4] == (False, False)
        assert not env.success
    last = env.step(actions[-1])
    assert last[2:4] == (terminated, truncated)
    assert (env.end, env.success, env.outcome) == (end, success, outcome)
    assert last[4]["end"] == end.value
    if end is EndReason.INVALID:
        assert env.log_reward == env.log_reward_floor == 0.0
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("+")


def test_expert_solves_every_instance_of_both_splits_by_the_shortest_way() -> None:
    env = NumberLineEnv()
    for seed in range(200):
        env.reset(seed=seed, options={"split": "ood" if seed % 2 else "id"})
        while env.end is None:
            env.step(env.expert_action())
        assert env.success
        assert env.end is EndReason.DONE
        assert len(env.past_actions) == abs(env.start - env.target)


def test_history_prompt_tells_past_numbers_but_not_the_target_nor_the_current_one() -> None:
    env = started(37, 41, "ood")
    assert "37" not in env.prompt()
    assert "41" not in env.prompt()
    env.step("+")
    env.step("+")
    assert "State 0: 37 Action 0: +\nState 1: 38 Action 1: +\nState 2: picture\n" in env.prompt()
    assert "41" not in env.prompt()
    assert "39" not in env.prompt()
    assert all(action in env.prompt() for action in env.admissible_actions)


def test_history_grows_by_few_characters_a_step() -> None:
    env = NumberLineEnv()
    env.reset(seed=0)
    before = len(env.prompt())
    env.step("+")
    assert len(env.prompt()) - before <= 25


def test_markov_prompt_is_the_same_at_every_state() -> None:
    env = started(1, 4, prompt="markov")
    first = env.prompt()
    env.step("+")
    assert env.prompt() == first
    assert "1 Action" not in first


@pytest.mark.parametrize(
    ("start", "words"), [(1, "below|less|before"), (4, "above|more|after"), (3, "equal|same|match")]
)
@pytest.mark.parametrize("action", ["+", "-", DONE_TOKEN])
def test_demonstration_reads_the_numbers_and_states_their_relation_whatever_the_action(
    start: int, words: str, action: str
) -> None:
    env = started(2, 3)
    while env.current != start:
        env.step("+" if env.current < start else "-")
    found = set()
    for seed in range(40):
        parsed = parse_response(env.demonstration(action, np.random.default_rng(seed)))
        assert parsed.action == action
        assert parsed.fields == {"current": start, "target": 3}
        assert "+" not in parsed.thoughts
        assert "-" not in parsed.thoughts
        found.add(parsed.thoughts)
    assert len(found) == 3
    assert all(any(word in thought for word in words.split("|")) for thought in found)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    split=st.sampled_from(["id", "ood"]),
    actions=st.lists(st.one_of(st.sampled_from(["+", "-", DONE_TOKEN]), st.text(max_size=30)), max_size=12),
)
def test_no_action_string_raises_and_the_record_stays_consistent(seed: int, split: str, actions: list[str]) -> None:
    env = NumberLineEnv()
    env.reset(seed=seed, options={"split": split})
    low, high = env.bounds
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert reward in (-1.0, 0.0, 1.0)
        assert low <= env.current <= high
        assert 0.0 <= env.log_reward <= np.log(100.0)
        assert (terminated or truncated) == (env.end is not None) == (info["end"] is not None)
        assert (env.end is EndReason.INVALID) == (action not in ("+", "-", DONE_TOKEN))
        if env.end is not None:
            break


def test_pictures_of_one_pair_of_numbers_vary_between_instances() -> None:
    env, pictures = NumberLineEnv(), []
    for seed in range(400):
        env.reset(seed=seed)
        if (env.start, env.target) == (2, 3):
            pictures.append(env.image_png())
    assert len(pictures) > 5
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("size", [32, 64, 100, 336])
@pytest.mark.parametrize("split", ["id", "ood"])
def test_numbers_are_drawn_dark_on_light_and_inside_the_picture(size: int, split: str) -> None:
    env = NumberLineEnv(NumberLineSettings(image_size=size))
    for seed in range(40):
        env.reset(seed=seed, options={"split": split})
        grey = np.array(env.picture().convert("L"), dtype=int)
        assert grey.shape == (size, size)
        ink = np.abs(grey - grey[0, 0]) > 60
        border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert not border.any(), f"seed {seed}: ink on the border"
        for half in (ink[size // 4 : size // 2], ink[3 * size // 4 :]):
            assert half.mean() > 0.02, f"seed {seed}: no number in a half"


def test_different_numbers_give_different_pictures_in_the_same_looks() -> None:
    from gflowvlm.envs.numberline import rendering

    pictures = {rendering.draw(3, n, 64, np.random.default_rng(5)).tobytes() for n in range(100)}
    assert len(pictures) == 100
    assert isinstance(rendering.draw(3, 4, 64, np.random.default_rng(5)), Image.Image)
