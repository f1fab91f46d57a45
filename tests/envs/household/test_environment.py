"""ALFWorld's environment: games, rewards, ends, expert, prompts, and what no response can do to it."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import gflowvlm
from gflowvlm.envs.household.environment import AlfworldEnv
from gflowvlm.envs.household.settings import AlfworldSettings
from gflowvlm.envs.household.tasks import SUB_GOALS, TaskType
from gflowvlm.envs.registry import make_env as make_registered
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.instances import DEMONSTRATION_SEEDS, EVALUATION_SEEDS, TRAINING_SEEDS
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import default_settings
from gflowvlm.shared.trajectory import EndReason
from tests.shared.json_answers import parse_response

MakeEnv = Callable[..., AlfworldEnv]


def play_expert(env: AlfworldEnv) -> list[float]:
    """Plays the expert to the end and returns the original rewards."""
    rewards = []
    while env.end is None:
        rewards.append(env.advance(env.expert_action()))
    return rewards


def test_gymnasium_accepts_the_environment(games_root: Path, recwarn: pytest.WarningsRecorder) -> None:
    settings = AlfworldSettings(games=str(games_root), image_size=64)
    env = gymnasium.make("gflowvlm/Alfworld-v0", settings=settings, render_mode="rgb_array")
    check_env(env.unwrapped)
    assert [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)] == []


def test_registry_makes_it_from_its_name() -> None:
    settings = default_settings("alfworld")
    assert isinstance(settings, AlfworldSettings)
    assert isinstance(make_registered(settings), AlfworldEnv)
    assert settings.max_steps == 35


def test_expert_solves_every_game_of_every_type_in_seen_and_unseen_rooms(make_env: MakeEnv) -> None:
    solved: dict[tuple[str, str], int] = {}
    for folder, split, games in (("train", "id", 12), ("valid_seen", "id", 6), ("train", "ood", 6)):
        env = make_env(seen_games=folder)
        for seed in range(games):
            env.reset(seed=seed, options={"split": split})
            rewards = play_expert(env)
            assert (env.success, env.outcome, env.end) == (True, "goal", EndReason.DONE), env.game.name
            total = SUB_GOALS[env.game.task_type]
            assert sum(rewards) == 50 + total
            assert max(rewards) == env.settings.largest_reward
            assert env.log_reward == math.log(50 + total)
            key = (folder if split == "id" else "unseen", env.game.task_type.value)
            solved[key] = solved.get(key, 0) + 1
    assert solved == {
        (folder, task_type.value): 2 if folder == "train" else 1
        for folder in ("train", "valid_seen", "unseen")
        for task_type in TaskType
    }


def test_expert_finds_its_way_back_from_wherever_the_policy_left_it(make_env: MakeEnv) -> None:
    env, rng = make_env(), np.random.default_rng(3)
    for seed in range(12):
        env.reset(seed=seed)
        for _ in range(8):
            commands = [action for action in env.admissible_actions if action != DONE_TOKEN]
            env.advance(commands[int(rng.integers(len(commands)))])
        play_expert(env)
        assert env.success, env.game.name


def test_consecutive_seeds_play_every_game_once_and_a_seed_is_always_the_same_game(make_env: MakeEnv) -> None:
    env, names = make_env(seen_games="train"), []
    for seed in range(12):
        env.reset(seed=seed)
        names.append(env.game.name)
    assert len(set(names)) == 12
    other = make_env(seen_games="train")
    for seed in (11, 3, 15):
        other.reset(seed=seed)
        assert other.game.name == names[seed % 12]
        assert other._session.task == other.game.task()


def test_evaluations_play_other_games_of_the_seen_rooms_than_anything_that_is_learned_from(
    make_env: MakeEnv, games_root: Path
) -> None:
    env = make_env()

    def folders(seeds: range, split: str = "id") -> set[str]:
        found = set()
        for seed in seeds:
            env.reset(seed=seed, options={"split": split})
            found.add(env.game.folder.relative_to(games_root / "json_2.1.1").parts[0])
        return found

    assert folders(EVALUATION_SEEDS[:3]) == folders(EVALUATION_SEEDS[-3:]) == {"valid_seen"}
    assert folders(TRAINING_SEEDS[:3]) == folders(TRAINING_SEEDS[-3:]) == {"train"}
    assert folders(DEMONSTRATION_SEEDS[:3]) == folders(DEMONSTRATION_SEEDS[-3:]) == {"train"}
    assert folders(TRAINING_SEEDS[:3], "ood") == folders(EVALUATION_SEEDS[:3], "ood") == {"valid_unseen"}


def test_a_run_can_be_of_a_few_train_games_of_each_type(make_env: MakeEnv) -> None:
    env = make_env(train_games=6, seen_games="train")
    games = []
    for seed in range(12):
        env.reset(seed=seed)
        games.append((env.game.task_type, env.game.name))
    assert len(set(games)) == 6
    assert {task_type for task_type, _ in games} == set(TaskType)
    env.reset(seed=7, options={"split": "ood"})
    assert env.game.folder.parent.parent.name == "valid_unseen"


def test_where_no_game_of_seen_rooms_is_held_out_evaluations_play_those_of_training(
    games_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "json_2.1.1").mkdir()
    (tmp_path / "json_2.1.1" / "train").symlink_to(games_root / "json_2.1.1" / "train", target_is_directory=True)
    env = AlfworldEnv(AlfworldSettings(games=str(tmp_path)))
    env.reset(seed=EVALUATION_SEEDS[0])
    assert env.game.folder.relative_to(tmp_path / "json_2.1.1").parts[0] == "train"
    with pytest.raises(UserError, match="valid_unseen: no game"):
        env.reset(seed=0, options={"split": "ood"})


def test_rollouts_of_a_group_play_the_same_game_without_touching_each_other(make_env: MakeEnv) -> None:
    group = [make_env(), make_env(), make_env()]
    for env in group:
        env.reset(seed=4)
    first = group[0].prompt()
    group[0].advance(group[0].expert_action())
    assert [env.prompt() == first for env in group] == [False, True, True]
    assert len({env.image_png() for env in group}) == 2
    play_expert(group[1])
    assert [env.success for env in group] == [False, True, False]


def test_a_branch_goes_its_own_way(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=5)
    env.advance(env.expert_action())
    before = env.prompt(), env.image_png()
    branch = env.branch()
    assert (branch.prompt(), branch.image_png()) == before
    play_expert(branch)
    assert branch.success
    assert (env.prompt(), env.image_png(), env.end) == (*before, None)


def test_there_is_no_exact_target(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=5)
    assert env.target_distribution(1.0) is None
    assert env.target_success(1.0) is None


def test_task_types_can_be_chosen(make_env: MakeEnv) -> None:
    env = make_env(task_types=["look_at_obj_in_light"])
    types = set()
    for seed in range(5):
        env.reset(seed=seed)
        types.add(env.reset(seed=seed)[1]["task_type"])
    assert types == {"look_at_obj_in_light"}


def test_the_kind_of_an_instance_is_the_task_type_of_the_game_it_plays(make_env: MakeEnv) -> None:
    env = make_env()
    for split in ("id", "ood"):
        for seed in range(6):
            told = env.category(seed, split)
            assert env.reset(seed=seed, options={"split": split})[1]["task_type"] == told


def test_rewards_follow_the_sub_goals_and_their_first_time_only(make_env: MakeEnv) -> None:
    env = make_env(task_types=["pick_heat_then_place_in_recep"])
    env.reset(seed=0)
    log_rewards, rewards = [env.log_reward], []
    while not env.expert_action().startswith("heat"):
        rewards.append(env.advance(env.expert_action()))
        log_rewards.append(env.log_reward)
    # Nothing reached, then the target in the hand: R = 0.1, 1.
    assert sorted(set(log_rewards)) == pytest.approx([math.log(0.1), 0.0])
    assert sum(rewards) == 1
    heat = env.expert_action()
    assert env.advance(heat) == 1
    assert env.log_reward == math.log(2)
    assert env.advance(heat) == 0
    assert env.log_reward == math.log(2)


def test_putting_the_target_down_takes_the_sub_goal_back_but_pays_no_second_time(make_env: MakeEnv) -> None:
    env = make_env(task_types=["pick_and_place_simple"])
    env.reset(seed=0)
    while not env.expert_action().startswith("take"):
        env.advance(env.expert_action())
    take = env.expert_action()
    thing, place = take.removeprefix("take ").split(" from ")
    put = f"move {thing} to {place}"
    assert [env.advance(action) for action in (take, put, take)] == [1, 0, 0]
    assert env.log_reward == 0.0
    env.advance(put)
    assert env.log_reward == math.log(0.1)


@pytest.mark.parametrize(
    ("last", "end", "success"),
    [(DONE_TOKEN, EndReason.DONE, True), ("fly", EndReason.INVALID, False), ("", EndReason.INVALID, False)],
)
def test_at_the_goal_only_stopping_counts(make_env: MakeEnv, last: str, end: EndReason, success: bool) -> None:
    env = make_env()
    env.reset(seed=1)
    while env.expert_action() != DONE_TOKEN:
        env.advance(env.expert_action())
    assert env.end is None
    assert not env.success
    reward = env.advance(last)
    assert (env.end, env.success, reward) == (end, success, 50.0 if success else -1.0)
    assert env.log_reward == (math.log(50 + SUB_GOALS[env.game.task_type]) if success else math.log(0.1))


def test_step_limit_cuts_the_episode_off_and_pays_where_the_goal_holds(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=1)
    plan = env._session.plan()
    for steps, success in ((len(plan), True), (len(plan) - 1, False)):
        limited = make_env(max_steps=steps)
        limited.reset(seed=1)
        rewards = [limited.step(action) for action in plan[:steps]]
        assert rewards[-1][2:4] == (False, True)
        assert (limited.end, limited.success) == (EndReason.STEP_LIMIT, success)
        assert (rewards[-1][1] >= 50) is success


def test_stopping_at_once_is_the_floor(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=2)
    assert env.advance(DONE_TOKEN) == 0.0
    assert (env.end, env.success, env.outcome) == (
        EndReason.DONE,
        False,
        f"0 of {SUB_GOALS[env.game.task_type]} sub-goals",
    )
    assert env.log_reward == env.log_reward_floor == math.log(0.1)


def test_prompt_has_task_history_and_commands_but_not_what_the_picture_shows(make_env: MakeEnv) -> None:
    env, markov = make_env(), make_env(prompt="markov")
    for each in (env, markov):
        each.reset(seed=0)
        for _ in range(2):
            each.advance(each.expert_action())
    prompt = env.prompt()
    assert prompt.startswith("Your task is to: ")
    assert "UNKNOWN GOAL" not in prompt
    first, second = env.past_actions
    assert "State 0: You are in the middle of a room." in prompt
    assert f"Action 0: {first}\nState 1: " in prompt
    assert f"Action 1: {second}\nState 2: picture\n" in prompt
    assert env._state_text() not in prompt
    assert all(command in prompt for command in env.admissible_actions)
    assert "Welcome" not in prompt
    assert "Action 0" not in markov.prompt()
    assert markov.prompt().splitlines()[0] == prompt.splitlines()[0]


def test_demonstrations_read_place_and_hand_and_leave_the_action_open(make_env: MakeEnv) -> None:
    env = make_env(task_types=["pick_clean_then_place_in_recep"])
    env.reset(seed=0)
    told = []
    while env.end is None:
        action = env.expert_action()
        texts = env.demonstrations(action)
        assert len(set(texts)) == 3
        parsed = [parse_response(text) for text in texts]
        assert {p.action for p in parsed} == {action}
        others = [parse_response(text) for text in env.demonstrations("look")]
        assert [(p.fields, p.thoughts) for p in parsed] == [(p.fields, p.thoughts) for p in others]
        assert action not in " ".join(p.thoughts for p in parsed)
        told.append(parsed[0].fields["hand"])
        env.advance(action)
    target = env._session.task.target.lower()
    assert told[0] == "nothing"
    assert any(hand.startswith(f"{target} ") for hand in told)
    assert any(hand.startswith(f"clean {target} ") for hand in told)


PIECES = [
    "go to", "take", "\x00", "\ud800", "[DONE", "[done]", "{", '{"action": "', "look ", " look", "LOOK", "inventory\n",
    "𝕘𝕠", "\x1b[2J", "</s>", "<image>", "<|im_end|>", "apple 1", "nothing", "'; import os", "../..", "%s%n", "{r.name}",
    "[{o.name | holds(a:agent, o:object)}]", "#look.feedback#", "help;help", "9" * 400, "a" * 5000,
]  # fmt: skip


def test_ten_thousand_hostile_responses_change_nothing(make_env: MakeEnv) -> None:
    env, rng = make_env(image_size=64), np.random.default_rng(0)
    env.reset(seed=0)
    env.advance(env.expert_action())
    facts, picture, admissible = env._session.observation.facts, env.image_png(), set(env.admissible_actions)
    for _ in range(10_000):
        response = "".join(PIECES[i] for i in rng.integers(len(PIECES), size=int(rng.integers(0, 5))))
        parsed = parse_response(response)
        action = response if parsed.action is None else parsed.action
        if action in admissible:
            continue
        assert env.advance(action) == -1.0
        assert (env.end, env.success, env.outcome) == (EndReason.INVALID, False, "invalid")
        assert env.log_reward == math.log(0.1)
        assert env.past_actions == env.past_actions[:1]
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.advance("look")
        # The game itself was not touched: the next response meets the same state.
        env.end = None
    assert env._session.observation.facts == facts
    assert set(env._session._engine.step("look").commands) == admissible - {DONE_TOKEN}
    env._picture = None
    assert env.image_png() == picture


def test_random_players_meet_no_exception_and_consistent_records(make_env: MakeEnv) -> None:
    env, rng = make_env(image_size=64), np.random.default_rng(1)
    for seed in range(6):
        env.reset(seed=seed)
        total = SUB_GOALS[env.game.task_type]
        while env.end is None:
            actions = [action for action in env.admissible_actions if action != DONE_TOKEN]
            observation, _, _, _, info = env.step(actions[int(rng.integers(len(actions)))])
            assert env.observation_space.contains(observation)
            assert info["success"] is env.success
            assert math.log(0.1) <= info["log_reward"] <= math.log(50 + total)
        assert len(env.past_actions) == 35 or env.success
        assert len(env.prompt()) < 35 * 600


PROBE = """
import hashlib, json, sys
from gflowvlm.envs.household.environment import AlfworldEnv
from gflowvlm.envs.household.settings import AlfworldSettings
env, seen = AlfworldEnv(AlfworldSettings(games=sys.argv[1])), []
for seed in (0, 5):
    for split in ("id", "ood"):
        observation, info = env.reset(seed=seed, options={"split": split})
        while env.end is None:
            seen.append([hashlib.sha256(env.image_png() + observation.tobytes()).hexdigest(), info])
            observation, *_, info = env.step(env.expert_action())
print(json.dumps(seen))
"""


def test_games_pictures_and_texts_are_the_same_bytes_in_every_process(games_root: Path) -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROBE, str(games_root)],
            capture_output=True,
            text=True,
            check=True,
            timeout=180,
            env={"PYTHONPATH": str(Path(gflowvlm.__file__).parents[1]), "PYTHONHASHSEED": hash_seed, "HOME": "/tmp"},
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(json.loads(outputs[0])) > 12


def test_thor_says_what_is_missing_where_it_cannot_run(make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(UserError, match=r"view thor.*missing: .*DISPLAY is not set.*3-D scene in .*traj_data\.json"):
        make_env(view="thor").reset(seed=0)
