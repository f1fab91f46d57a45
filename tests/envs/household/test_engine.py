"""The text game underneath: with and without memoisation, its planner's side effects, alfworld's own environment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gflowvlm
from gflowvlm.envs.household.engine import read_game
from gflowvlm.envs.household.games import find_games
from gflowvlm.envs.household.generation import generate, specs
from gflowvlm.envs.household.sessions import TextSession
from gflowvlm.envs.household.tasks import TaskType
from gflowvlm.shared.errors import UserError

TYPES = tuple(TaskType)

# What a person gets who starts textworld and alfworld by their own documentation.
PLAIN = """
import json, sys
import textworld
from textworld import EnvInfos
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
out = []
for path, commands in json.loads(sys.argv[1]):
    infos = EnvInfos(won=True, admissible_commands=True, facts=True, policy_commands=True)
    env = textworld.start(path, infos, [AlfredDemangler(shuffle=False), AlfredInfos])
    state = env.reset()
    for command in [None, *commands]:
        if command is not None:
            state, _, _ = env.step(command)
        facts = sorted([f.name, *[a.name.strip() for a in f.arguments]] for f in state["facts"])
        out.append([state["feedback"], state["admissible_commands"], state["won"],
                    [f for f in facts if not f[0].startswith("not_")], state["policy_commands"]])
print("RESULT" + json.dumps(out))
"""
OURS = """
import json, sys
from gflowvlm.envs.household.engine import GameEngine, read_game
from pathlib import Path
out, engine = [], GameEngine()
for path, commands in json.loads(sys.argv[1]):
    # Loaded and played twice, so that the second time everything is remembered.
    for time in (1, 2):
        engine.load(read_game(Path(path)))
        told, state = [], engine.reset()
        for command in [None, *commands]:
            if command is not None:
                state = engine.step(command)
            facts = sorted(list(f) for f in state.facts)
            told.append([state.feedback, list(state.commands), state.won, facts, list(engine.plan())])
    out += told
print("RESULT" + json.dumps(out))
"""


def run(code: str, argument: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(Path(gflowvlm.__file__).parents[1]), "PYTHONHASHSEED": "0", "HOME": "/tmp"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("RESULT")[2])
    assert isinstance(found, list)
    return found


@pytest.mark.slow
def test_observations_are_those_of_the_unpatched_packages(games_root: Path, tmp_path: Path) -> None:
    list(generate(tmp_path, specs({"train": 1}, "full", seed=1), workers=1))
    games = find_games(games_root, "train", TYPES)
    assert {game.task_type for game in games} == set(TYPES)
    script = []
    for game in (*games[:8], *find_games(tmp_path, "train", TYPES)):
        walkthrough = game.content()["walkthrough"]
        noise = ["help", "inventory", "look", "fly", "examine nothing", ""]
        commands = [word for command in walkthrough for word in (command, "look", "inventory")]
        commands[5:5] = noise
        script.append([str(game.folder / "game.tw-pddl"), commands])
    plain, ours = run(PLAIN, json.dumps(script)), run(OURS, json.dumps(script))
    assert len(plain) == len(ours) > 60
    for before, after in zip(plain, ours, strict=True):
        assert before == after


def test_planner_leaves_the_process_as_it_was(games_root: Path) -> None:
    arguments, output = list(sys.argv), sys.stdout
    session = TextSession(find_games(games_root, "valid_unseen", TYPES)[0])
    session.plan()
    assert sys.argv == arguments
    assert sys.stdout is output


@pytest.mark.slow
def test_alfworlds_own_environment_plays_the_generated_games(games_root: Path) -> None:
    code = """
import json, sys
from alfworld.agents.environment import get_environment
root = sys.argv[1] + "/json_2.1.1/"
config = {
    "dataset": {"data_path": root + "train", "eval_id_data_path": root + "valid_seen",
                "eval_ood_data_path": root + "valid_unseen", "num_train_games": -1, "num_eval_games": -1},
    "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6], "domain_randomization": False,
            "expert_type": "handcoded"},
    "general": {"training_method": "dqn"}, "rl": {"training": {"max_nb_steps_per_episode": 50}},
}
won = {}
for split in ("train", "eval_in_distribution", "eval_out_of_distribution"):
    collected = get_environment("AlfredTWEnv")(config, train_eval=split)
    env = collected.init_env(batch_size=1)
    for _ in collected.game_files:
        _, info = env.reset()
        game = info["extra.gamefile"][0]
        for command in json.load(open(game))["walkthrough"]:
            _, _, _, info = env.step([command])
        won[game] = bool(info["won"][0])
    env.close()
print("RESULT" + json.dumps(list(won.values())))
"""
    assert run(code, str(games_root)) == [True] * 24


def test_engines_go_back_to_the_pool_and_are_used_again(games_root: Path) -> None:
    game = find_games(games_root, "train", TYPES)[0]
    first = TextSession(game)
    engine = first._engine
    del first
    again = TextSession(game)
    assert again._engine is engine
    assert TextSession(game)._engine is not engine


@pytest.mark.parametrize("text", ["", "{", "[]", '{"grammar": ""}'])
def test_a_broken_game_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "game.tw-pddl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"game\.tw-pddl.*restore it"):
        read_game(path)
