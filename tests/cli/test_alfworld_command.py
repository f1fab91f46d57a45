"""`gflowvlm alfworld generate` and `games`, and the task played by `gflowvlm play`."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner, Result

from gflowvlm.cli.commands import alfworld, play
from gflowvlm.shared.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIX = ("--train", "6", "--seen", "0", "--unseen", "0", "--workers", "1")

pytestmark = pytest.mark.skipif(find_spec("alfworld") is None, reason="make alfworld")


def run(*arguments: str, typed: str = "", data: Path | None = None) -> Result:
    """Runs a command line with the two commands."""
    app = typer.Typer(pretty_exceptions_enable=False)
    alfworld.register(app)
    play.register(app)
    return CliRunner().invoke(app, arguments, input=typed, env={"ALFWORLD_DATA": None if data is None else str(data)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one generated game of each type."""
    made = tmp_path_factory.mktemp("games")
    result = run("alfworld", "generate", str(made), *SIX)
    assert result.exit_code == 0, result.output
    assert "6/6 games" in result.output
    return made


def test_generated_games_are_counted_by_type_and_not_made_twice(folder: Path) -> None:
    files = sorted(folder.rglob("game.tw-pddl"))
    times = [file.stat().st_mtime_ns for file in files]
    again = run("alfworld", "generate", str(folder), *SIX)
    assert "6 of 6 games are there already" in again.output
    assert [file.stat().st_mtime_ns for file in files] == times
    counted = run("alfworld", "games", str(folder))
    assert counted.exit_code == 0
    assert "pick_two_obj_and_place" in counted.output
    assert [word for word in counted.output.splitlines()[-2].split() if word.isdigit()] == ["6", "0", "0"]


def test_expert_plays_them_and_a_person_can_by_numbers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "expert.json"
    played = run("play", "alfworld", "--player", "expert", "--episodes", "6", "--json", str(out), data=folder)
    assert played.exit_code == 0, played.output
    episodes = json.loads(out.read_text())
    assert [episode["success"] for episode in episodes] == [True] * 6
    # The person types what the expert did, the first command by the number that stands before it.
    first, *others = episodes[0]["actions"]
    shown = run("play", "alfworld", "--images", str(tmp_path), typed="\n", data=folder)
    (number,) = [line.split()[0] for line in shown.output.splitlines() if line.strip().endswith(f" {first}")][:1]
    typed = "\n".join(["fly", number, *others]) + "\n"
    mine = tmp_path / "mine.json"
    by_hand = run("play", "alfworld", "--images", str(tmp_path), "--json", str(mine), typed=typed, data=folder)
    assert "'fly' is not possible here." in by_hand.output
    assert json.loads(mine.read_text()) == episodes[:1]


def test_games_of_one_type_are_made_on_request(tmp_path: Path) -> None:
    options = ("--task-type", "pick_and_place_simple", "--train", "2", "--seen", "0", "--unseen", "1", "--workers", "1")
    result = run("alfworld", "generate", str(tmp_path), *options)
    assert result.exit_code == 0, result.output
    names = [path.parent.parent.name for path in tmp_path.rglob("game.tw-pddl")]
    assert [name.split("-")[0] for name in names] == ["pick_and_place_simple"] * 3


@pytest.mark.slow
def test_interrupted_generation_keeps_its_games_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gflowvlm.cli.main", "alfworld", "generate", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("game.tw-pddl"))) < 3:
        assert time.monotonic() < deadline, "no games within 120 s"
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "the same command goes on" in " ".join(told.split())
    made = len(list(tmp_path.rglob("game.tw-pddl")))
    assert 3 <= made < 200
    assert list(tmp_path.glob(".partial*")) == []


def test_a_type_named_twice_is_made_once(tmp_path: Path) -> None:
    pick, few = ("--task-type", "pick_and_place_simple"), ("--train", "2", "--seen", "0", "--unseen", "0")
    result = run("alfworld", "generate", str(tmp_path), *pick, *pick, *few, "--workers", "1")
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.rglob("game.tw-pddl"))) == 2


def test_games_that_cannot_be_written_or_read_are_named_and_nothing_half_made_stays(tmp_path: Path) -> None:
    full, damaged = tmp_path / "full", tmp_path / "damaged"
    full.mkdir()
    (full / "json_2.1.1").touch()
    told = run("alfworld", "generate", str(full), "--train", "1", "--seen", "0", "--unseen", "0", "--workers", "1")
    assert isinstance(told.exception, UserError)
    assert "cannot be written" in str(told.exception)
    assert [path.name for path in full.iterdir()] == ["json_2.1.1"]
    game = damaged / "json_2.1.1" / "train" / "pick_and_place_simple-Mug-None-Desk-301" / "trial" / "game.tw-pddl"
    game.parent.mkdir(parents=True)
    game.write_bytes(b"\xff")
    (game.parent / "traj_data.json").write_text("{}")
    told = run("alfworld", "games", str(damaged))
    assert isinstance(told.exception, UserError)
    assert "not a readable game" in str(told.exception)


@pytest.mark.slow
def test_workers_of_a_generation_that_was_killed_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gflowvlm.cli.main", "alfworld", "generate", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("game.tw-pddl"))) < 1:
            assert time.monotonic() < deadline, "no games within 120 s"
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait(30)
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
