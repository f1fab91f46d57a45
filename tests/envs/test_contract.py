"""What every task promises, whatever it is about."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from gflowvlm.envs.base import INVALID_OUTCOME, TaskEnv
from gflowvlm.envs.registry import environment_class, gymnasium_id
from gflowvlm.learner.tiny_policy import task_texts
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import default_settings, task_names
from gflowvlm.shared.trajectory import EndReason
from tests.envs.contract import HOSTILE, PROBE, TASKS, enumerated, made, remembered, wild_responses
from tests.shared.json_answers import parse_response

ROOT = Path(__file__).resolve().parents[2]
every_task = pytest.mark.parametrize("task", TASKS)


def walk(env: TaskEnv, seed: int, split: str, steps: int) -> None:
    """Plays random moves, at most `steps`, and stops before the episode ends."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed, options={"split": split})
    for _ in range(steps):
        after = env.branch()
        after.advance(str(rng.choice(env.admissible_actions)))
        if after.end is None:
            env.step(after.past_actions[-1])


@every_task
def test_gymnasium_accepts_the_environment(task: str, recwarn: pytest.WarningsRecorder) -> None:
    env = gymnasium.make(gymnasium_id(task), render_mode="rgb_array")
    check_env(env.unwrapped)
    assert [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)] == []


@every_task
def test_all_that_is_shown_is_the_same_bytes_in_every_process(task: str) -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROBE, task],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed, "HOME": "/tmp"},
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(json.loads(outputs[0])) >= 24


@every_task
def test_an_instance_does_not_depend_on_what_was_played_before(task: str) -> None:
    fresh, used = made(task), made(task)
    for seed in range(5):
        walk(used, seed + 100, "ood", 4)
        used.step("nonsense")
        walk(used, seed, "id", 2)
        walk(fresh, seed, "id", 2)
        assert used.image_png() == fresh.image_png()
        assert remembered(used) == remembered(fresh)


@every_task
def test_ten_thousand_wild_responses_neither_raise_nor_move_the_state(task: str) -> None:
    invalid = 0
    for seed in range(10):
        here = made(task)
        walk(here, seed, ("id", "ood")[seed % 2], seed % 3)
        before, admissible = remembered(here), here.admissible_actions
        for number, text in enumerate(wild_responses(here, 1000, seed)):
            env = here.branch()
            action = (text if number % 3 == 0 else parse_response(text).action) or ""
            # Drawing takes most of a step's time.
            if number % 20 == 0:
                env.step(action)
            else:
                env.advance(action)
            assert env.end is not None or len(env.past_actions) == len(here.past_actions) + 1
            if action not in admissible:
                invalid += 1
                assert (env.end, env.outcome, env.success) == (EndReason.INVALID, INVALID_OUTCOME, False)
                assert env.log_reward == env.log_reward_floor
                assert remembered(env) == before
        assert remembered(here) == before
    assert invalid > 7000


@every_task
@pytest.mark.parametrize("action", HOSTILE)
def test_hostile_actions_end_the_episode_at_the_floor(task: str, action: str) -> None:
    env = made(task)
    walk(env, 3, "id", 1)
    observation, _, terminated, truncated, info = env.step(action)
    assert env.observation_space.contains(observation)
    assert (terminated, truncated, info["end"], info["success"]) == (True, False, "invalid", False)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(DONE_TOKEN)


@every_task
@pytest.mark.parametrize("split", ["id", "ood"])
def test_expert_ends_every_episode_validly_for_the_largest_reward_at_most(task: str, split: str) -> None:
    env, rewards = made(task), []
    for seed in range(100):
        env.reset(seed=seed, options={"split": split})
        while env.end is None:
            assert env.expert_action() in env.admissible_actions
            rewards.append(env.advance(env.expert_action()))
        assert env.end in (EndReason.DONE, EndReason.ENVIRONMENT)
    assert max(rewards) == env.settings.largest_reward


@every_task
def test_demonstrations_say_the_same_whatever_the_action_and_then_take_it(task: str) -> None:
    env = made(task)
    for seed in range(20):
        walk(env, seed, ("id", "ood")[seed % 2], seed % 3)
        before_action = set()
        for action in env.admissible_actions:
            parsed = [parse_response(text) for text in env.demonstrations(action)]
            assert {p.action for p in parsed} == {action}
            assert len({p.thoughts for p in parsed}) == 3
            before_action.add(json.dumps([(p.fields, p.thoughts) for p in parsed]))
            drawn = {env.demonstration(action, np.random.default_rng(s)) for s in range(30)}
            assert drawn == set(env.demonstrations(action))
        assert len(before_action) == 1


@every_task
def test_prompts_are_short_and_name_goal_actions_and_answer(task: str) -> None:
    env = made(task)
    env.reset(seed=0)
    prompt = env.prompt()
    assert len(prompt) < 250
    lines = prompt.split("\n")
    assert (lines[0], lines[1], lines[-1]) == (env.goal, "State 0: picture", env.answer)
    assert lines[-2] == "Actions: " + " ".join(env.admissible_actions)


@every_task
def test_markov_prompt_has_no_history(task: str) -> None:
    env = made(task, prompt="markov")
    for seed in range(10):
        walk(env, seed, "id", 2)
        assert "Action 0" not in env.prompt()
        assert "State: picture" in env.prompt()


@every_task
def test_picture_does_not_depend_on_when_or_how_often_it_is_looked_at(task: str) -> None:
    looked, blind = made(task), made(task)
    looked.reset(seed=5)
    blind.reset(seed=5)
    move = next(a for a in looked.admissible_actions if a != DONE_TOKEN)
    looked.image_png()
    looked.render()
    looked.step(move)
    blind.advance(move)
    assert looked.image_png() == blind.image_png()


@every_task
@pytest.mark.parametrize("size", [32, 64, 100, 336])
def test_pictures_have_the_size_that_is_asked_for(task: str, size: int) -> None:
    env = made(task, image_size=size)
    assert env.reset(seed=0)[0].shape == (size, size, 3)
    assert env.picture().mode == "RGB"


@every_task
def test_a_branch_goes_its_own_way(task: str) -> None:
    env = made(task)
    env.reset(seed=1)
    before = remembered(env)
    for action in env.admissible_actions:
        env.branch().step(action)
    assert (remembered(env), env.end) == (before, None)


@pytest.mark.parametrize("split", ["id", "ood"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("numberline", {"n_max": 3, "ood_low": 10, "ood_high": 13, "ood_max_distance": 3, "max_steps": 3}),
        ("blackjack", {}),
        ("blackjack", {"max_steps": 1}),
        ("numbersequence", {"image_size": 32}),
        ("numbersequence", {"continuation": 2, "choices": 3, "image_size": 32}),
    ],
)
def test_target_equals_brute_force_enumeration(task: str, changes: dict[str, int], beta: float, split: str) -> None:
    env = made(task, **changes)
    for seed in range(6):
        expected, success = enumerated(env, seed, split, beta)
        env.reset(seed=seed, options={"split": split})
        assert env.target_distribution(beta) == pytest.approx(expected, rel=1e-10)
        assert env.target_success(beta) == pytest.approx(success, rel=1e-10)


@every_task
def test_target_is_the_instances_own_wherever_the_episode_stands(task: str) -> None:
    env = made(task)
    for seed in range(3):
        env.reset(seed=seed)
        before = env.target_distribution(2.0)
        walk(env, seed, "id", 2)
        assert env.target_distribution(2.0) == before
        env.step("nonsense")
        assert env.target_distribution(2.0) == before
        assert env.end is EndReason.INVALID


@every_task
def test_an_unknown_split_or_task_is_one_clear_line(task: str) -> None:
    with pytest.raises(UserError, match=r"split 'test'.*id, ood"):
        made(task).reset(seed=0, options={"split": "test"})
    with pytest.raises(UserError, match=rf"task 'chess'.*{task}"):
        default_settings("chess")


@pytest.mark.parametrize("task", task_names())
def test_what_a_task_declares_is_its_own(task: str) -> None:
    settings = default_settings(task)
    env = environment_class(settings)()
    assert type(env.settings) is type(settings)
    assert env.settings == settings
    assert env.task == task
    assert type(settings).largest_reward > 0
    assert type(settings).measured_on
    for_reading = settings.for_reading()
    assert type(settings).model_validate(for_reading.model_dump()) == for_reading
    folder = Path(inspect.getfile(type(settings))).resolve().parent
    assert folder == Path(inspect.getfile(type(env))).resolve().parent
    assert folder.parent == ROOT / "envs"


@every_task
def test_no_reward_exceeds_the_largest_that_the_task_declares(task: str) -> None:
    env = made(task)
    largest = type(env.settings).largest_reward
    for seed in range(20):
        env.reset(seed=seed, options={"split": ("id", "ood")[seed % 2]})
        while env.end is None:
            assert abs(env.advance(env.expert_action())) <= largest


@every_task
def test_the_tokenizer_of_the_tasks_has_all_words_of_prompt_and_responses(task: str) -> None:
    env = made(task)
    env.reset(seed=3)
    said = [env.prompt(), *(text for action in env.admissible_actions for text in env.demonstrations(action))]
    known = set(re.findall(r"[A-Za-z]+", " ".join(task_texts())))
    assert set(re.findall(r"[A-Za-z]+", " ".join(said).replace(DONE_TOKEN, ""))) <= known
