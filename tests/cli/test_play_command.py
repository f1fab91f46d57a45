"""`gflowvlm play`: every player, what it writes, and how it answers wrong input."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner, Result

from gflowvlm.cli.commands import play
from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.evaluation.playing import (
    Episode,
    ExpertPlayer,
    Move,
    RandomPlayer,
    RunPolicy,
    named_policy,
    play_episodes,
    policy_player,
)
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.models import shipped_models
from gflowvlm.run.preset_library import load_preset
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import apply_overrides, dump_config, load_config, parse_config
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason

ROOT = Path(__file__).resolve().parents[2]


def command_line() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    # With a second command the first is called by its name, as in the real application.
    app.command(name="other")(lambda: None)
    play.register(app)
    return app


def run(*arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(command_line(), ["play", *arguments], input=typed)


def listed(*arguments: str, to: Path, typed: str = "") -> list[dict[str, object]]:
    result = run(*arguments, "--json", str(to), typed=typed)
    assert result.exit_code == 0, result.output
    content = json.loads(to.read_text())
    assert isinstance(content, list)
    return content


def test_expert_solves_every_episode_and_the_json_lists_them(tmp_path: Path) -> None:
    arguments = ("numberline", "--player", "expert", "--episodes", "5", "--seed", "7")
    episodes = listed(*arguments, to=tmp_path / "out.json")
    assert [e["instance"] for e in episodes] == [f"numberline/id/{seed}" for seed in range(7, 12)]
    for episode in episodes:
        assert set(episode) == {"instance", "success", "actions", "rewards", "log_rewards", "steps", "end"}
        assert episode["success"] is True
        assert episode["end"] == "done"
        actions, log_rewards = episode["actions"], episode["log_rewards"]
        assert isinstance(actions, list)
        assert isinstance(log_rewards, list)
        assert actions[-1] == DONE_TOKEN
        assert episode["steps"] == len(actions) == len(log_rewards)
        assert log_rewards[-1] == pytest.approx(4.605, abs=1e-3)


def test_one_picture_per_state_is_written_and_shows_that_state(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    arguments = ("numberline", "--player", "expert", "--episodes", "2", "--split", "ood", "--images", str(folder))
    episodes = listed(*arguments, to=tmp_path / "out.json")
    expected = []
    for number, episode in enumerate(episodes):
        assert isinstance(episode["steps"], int)
        expected += [f"episode_{number:03d}_step_{step:02d}.png" for step in range(episode["steps"])]
    assert sorted(path.name for path in folder.iterdir()) == expected
    env = NumberLineEnv()
    env.reset(seed=1, options={"split": "ood"})
    assert (folder / "episode_001_step_00.png").read_bytes() == env.image_png()
    assert Image.open(folder / "episode_001_step_01.png").size == (64, 64)


def test_every_task_is_played_by_expert_random_and_by_hand(tmp_path: Path) -> None:
    ends = {"blackjack": {"done", "environment"}, "numbersequence": {"done"}}
    for task in ends:
        episodes = listed(task, "--player", "expert", "--episodes", "30", to=tmp_path / "expert.json")
        assert {e["end"] for e in episodes} == ends[task]
        assert task == "blackjack" or all(e["success"] for e in episodes)
        by_chance = listed(task, "--player", "random", "--episodes", "30", to=tmp_path / "random.json")
        assert {e["end"] for e in by_chance} == {"done", "environment"}
        actions = episodes[3]["actions"]
        assert isinstance(actions, list)
        typed = "double\n" + "\n".join(actions) + "\n"
        (by_hand,) = listed(task, "--seed", "3", to=tmp_path / "hand.json", typed=typed)
        assert by_hand == episodes[3]


def test_the_last_picture_of_a_hand_shows_the_dealers_cards(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    listed("blackjack", "--seed", "0", "--images", str(folder), to=tmp_path / "out.json", typed="stand\n")
    assert sorted(p.name for p in folder.iterdir()) == ["episode_000_step_00.png", "episode_000_step_01.png"]
    assert (folder / "episode_000_step_00.png").read_bytes() != (folder / "episode_000_step_01.png").read_bytes()


def test_settings_of_the_task_change_what_is_played(tmp_path: Path) -> None:
    arguments = ("numberline", "n_max=1", "image_size=96", "--player", "expert", "--episodes", "4")
    episodes = listed(*arguments, "--images", str(tmp_path / "pictures"), to=tmp_path / "out.json")
    assert [episode["steps"] for episode in episodes] == [2] * 4, "between 0 and 1 it is one move, and the stop"
    assert Image.open(tmp_path / "pictures" / "episode_000_step_00.png").size == (96, 96)


def test_random_player_repeats_itself_and_differs_between_seeds(tmp_path: Path) -> None:
    arguments = ("numberline", "--player", "random", "--episodes", "20")
    first, again = (listed(*arguments, to=tmp_path / name) for name in ("a.json", "b.json"))
    assert first == again
    assert len({str(episode["actions"]) for episode in first}) > 5
    assert all(episode["end"] in ("done", "step_limit") for episode in first)


def test_person_is_asked_again_after_a_wrong_action_and_may_write_done_in_short(tmp_path: Path) -> None:
    env = NumberLineEnv()
    env.reset(seed=0)
    move = env.expert_action()
    away = abs(env.target - env.start)
    typed = "left\n\n\x1b[2J\n" + f" {move} \n" * away + "Done\n"
    result = run("numberline", "--json", str(tmp_path / "out.json"), typed=typed)
    assert result.exit_code == 0
    assert "'left' is not possible here" in result.output
    assert "\x1b[2J" not in result.output
    assert env.prompt() in result.output
    (episode,) = json.loads((tmp_path / "out.json").read_text())
    assert episode["actions"] == [move] * away + [DONE_TOKEN]
    assert episode["success"] is True


def test_end_of_input_keeps_the_finished_episodes_and_drops_the_open_one(tmp_path: Path) -> None:
    episodes = listed("numberline", "--episodes", "3", to=tmp_path / "out.json", typed="[DONE]\n+\n")
    assert [e["instance"] for e in episodes] == ["numberline/id/0"]
    assert listed("numberline", to=tmp_path / "none.json", typed="") == []


def test_ctrl_c_at_the_question_ends_playing_without_a_traceback() -> None:
    code = (
        "import typer; from gflowvlm.cli.commands import play; app = typer.Typer(); "
        "app.command(name='other')(lambda: None); play.register(app); app(['play', 'numberline'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        seen = b""
        while b"Your action" not in seen:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece != b"", seen.decode()
            seen += piece
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, rest.decode()
    assert b"No episode was finished" in rest
    assert b"Traceback" not in rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chess",), "task 'chess'"),
        (("numberline", "--split", "test"), "--split 'test'"),
        (("numberline", "--player", "nobody"), "--player 'nobody'"),
        (("numberline", "--player", "blackjack-tiny"), "--player 'blackjack-tiny': its task is 'blackjack'"),
        (("numberline", "n_max=0"), "task numberline: n_max = 0"),
        (("numberline", "nmax=4"), "task numberline: unknown key 'nmax'; did you mean 'n_max'?"),
        (("numberline", "name=blackjack"), "task numberline: name = 'blackjack'"),
        (("numberline", "markov"), "override 'markov'"),
        (("numberline", "--player", "expert", "--json", "/nonexistent/out.json"), "--json /nonexistent/out.json"),
        (("numberline", "--player", "expert", "--images", "/dev/null/x"), "--images /dev/null/x"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


class Scripted:
    """Answers with given moves, one after the other."""

    def __init__(self, *moves: Move) -> None:
        self._moves = list(moves)

    def act(self, env: TaskEnv) -> Move:
        return self._moves.pop(0)


def played(*moves: Move) -> tuple[Episode, list[int]]:
    states: list[int] = []
    env = NumberLineEnv()
    (episode,) = play_episodes(
        env, Scripted(*moves), "id", [3], lambda _, env: states.append(len(env.past_actions)), lambda *_: None
    )
    return episode, states


def test_malformed_response_is_listed_as_none_and_scored_at_the_floor() -> None:
    episode, states = played(Move("-"), Move(None, "I think"))
    assert episode.actions == ["-", None]
    assert episode.end is EndReason.INVALID
    assert len(episode.log_rewards) == 3
    assert episode.log_rewards[-1] == 0.0
    assert states == [0, 1]


def test_step_limit_lists_a_log_reward_and_a_picture_for_every_state() -> None:
    episode, states = played(*[Move("-"), Move("+")] * 5)
    assert episode.end is EndReason.STEP_LIMIT
    assert episode.steps == len(episode.rewards) == 10
    assert len(episode.log_rewards) == 11
    assert states == list(range(11))


def test_random_and_expert_players_take_admissible_actions() -> None:
    env = NumberLineEnv()
    for seed in range(20):
        env.reset(seed=seed)
        assert RandomPlayer().act(env).action in env.admissible_actions
        assert ExpertPlayer().act(env).action == env.expert_action()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> RunFolder:
    """A run folder with two adapters."""
    folder = RunFolder(tmp_path / "run")
    folder.adapters.mkdir(parents=True)
    overrides = [f"policy.model={model}", "policy.max_response_tokens=8"]
    config = parse_config(apply_overrides({}, overrides), "test")
    folder.config.write_text(dump_config(config))
    base = AutoModelForImageTextToText.from_pretrained(model)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=r".*text_model.*q_proj", init_lora_weights=False))
    for version in (2, 3):
        peft.save_pretrained(folder.adapter(version))
    return folder


def test_run_folder_names_the_best_adapter_else_the_newest_else_the_base_model(folder: RunFolder) -> None:
    assert named_policy(str(folder.root), "numberline").version == 3
    folder.best.write_text('{"version": 2, "success": 0.5}')
    policy = named_policy(str(folder.root), "numberline")
    assert (policy.version, policy.adapter) == (2, folder.adapter(2))
    folder.best.write_text('{"version": 0}')
    assert named_policy(str(folder.root), "numberline").adapter is None
    folder.best.write_text('{"version": 9}')
    with pytest.raises(UserError, match="adapter version 9 was never published; there are 2-3"):
        named_policy(str(folder.root), "numberline")
    folder.best.write_text("[]")
    with pytest.raises(UserError, match=r"best\.json: names no adapter version"):
        named_policy(str(folder.root), "numberline")


def test_model_directory_plays_as_base_model_under_default_settings(model: Path) -> None:
    policy = named_policy(str(model), "numberline")
    assert policy.adapter is None
    assert policy.config == RunConfig.model_validate({"policy": {"model": str(model)}})


def test_shipped_model_plays_under_the_settings_of_its_preset() -> None:
    for model in shipped_models():
        preset = load_preset(model)
        policy = named_policy(model, preset.task.name)
        assert (policy.config, policy.adapter) == (preset, None)
        assert preset.policy.model == model


def test_run_plays_by_its_adapter_and_repeats_itself(folder: RunFolder, tmp_path: Path) -> None:
    arguments = ("numberline", "--player", str(folder.root), "--episodes", "2")
    result = run(*arguments, "--json", str(tmp_path / "a.json"))
    assert result.exit_code == 0, result.output
    assert "adapter version 3" in result.output
    episodes = json.loads((tmp_path / "a.json").read_text())
    # An untrained policy writes noise: every episode ends at its first response.
    assert [e["end"] for e in episodes] == ["invalid", "invalid"]
    assert [e["actions"] for e in episodes] == [[None], [None]]
    assert listed(*arguments, to=tmp_path / "b.json") == episodes
    assert "->" in result.output


def test_settings_on_the_command_line_are_laid_over_those_of_the_run(folder: RunFolder, tmp_path: Path) -> None:
    folder.config.write_text(dump_config(load_config(folder.config, ["task.image_size=48", "task.n_max=9"])))
    result = run("numberline", "n_max=3", "--player", str(folder.root), "--images", str(tmp_path))
    assert result.exit_code == 0, result.output
    env = NumberLineEnv(NumberLineSettings(n_max=3, image_size=48))
    env.reset(seed=0)
    assert (tmp_path / "episode_000_step_00.png").read_bytes() == env.image_png()


def test_terminal_picture_has_the_colours_of_the_png() -> None:
    env = NumberLineEnv()
    env.reset(seed=2)
    text = play.half_blocks(env, 64)
    rows = str(text).rstrip("\n").split("\n")
    assert [len(row) for row in rows] == [64] * 32
    picture = Image.open(io.BytesIO(env.image_png()))
    red, green, blue = picture.getpixel((0, 0))
    assert f"#{red:02x}{green:02x}{blue:02x}" in str(text.spans[0].style)


def test_an_adapter_that_its_run_removes_before_it_is_loaded_is_one_line(tmp_path):
    model = str(build_tiny_policy(tmp_path / "model", seed=0))
    policy = RunPolicy(RunConfig(policy={"model": model}), 2, tmp_path / "run" / "adapters" / "v00000002")
    problem = r"adapter version 2 was removed while it was loaded.*play again"
    with pytest.raises(UserError, match=problem), policy_player(policy):
        pass
