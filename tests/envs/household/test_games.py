"""Where games come from and how they are made."""

import hashlib
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gflowvlm
from gflowvlm.envs.household import starter
from gflowvlm.envs.household.games import find_games, games_there, official_data
from gflowvlm.envs.household.generation import generate, missing, specs
from gflowvlm.envs.household.scenes import floor_plan, plan_numbers, tasks_of
from gflowvlm.envs.household.tasks import TaskType
from gflowvlm.shared.errors import UserError

needs_alfworld = pytest.mark.skipif(find_spec("alfworld") is None, reason="make alfworld")
TYPES = tuple(TaskType)
FEW = {"train": 6}


def fingerprint(root: Path) -> dict[str, str]:
    """Every file below a folder with its digest."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_same_seed_makes_the_same_games_and_another_seed_others(games_root: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    for root, seed in ((again, 7), (other, 8)):
        root.mkdir()
        list(generate(root, specs(FEW, "small", seed), workers=1))
    whole = fingerprint(games_root)
    assert fingerprint(again).items() <= whole.items()
    assert not fingerprint(other).items() <= whole.items()
    assert len(fingerprint(again)) == 6 * 3


@pytest.mark.slow
def test_workers_make_the_same_games_as_one_process(games_root: Path, tmp_path: Path) -> None:
    list(generate(tmp_path, specs(FEW, "small", seed=7), workers=2))
    assert fingerprint(tmp_path).items() <= fingerprint(games_root).items()


def test_stopped_generation_goes_on_where_it_was(tmp_path: Path) -> None:
    if find_spec("alfworld") is None:
        pytest.skip("make alfworld")
    wanted = specs(FEW, "small", seed=9)
    made = generate(tmp_path, wanted, workers=1)
    first = [next(made), next(made)]
    made.close()
    times = {path: (path / "game.tw-pddl").stat().st_mtime_ns for path in first}
    left = missing(tmp_path, wanted)
    assert len(left) == 4
    list(generate(tmp_path, left, workers=1))
    assert missing(tmp_path, wanted) == []
    assert {path: (path / "game.tw-pddl").stat().st_mtime_ns for path in first} == times
    assert list(tmp_path.glob(".partial*")) == []


def test_games_have_alfworlds_names_and_files(games_root: Path) -> None:
    for folder in ("train", "valid_seen", "valid_unseen"):
        for game in find_games(games_root, folder, TYPES):
            kind, target, mrecep, place, scene = game.name.split("/")[0].split("-")
            task = game.task()
            assert (kind, target, mrecep, place) == (task.type.value, task.target, "None", task.receptacle or task.lamp)
            content = game.content()
            assert content["solvable"] is True
            assert 0 < len(content["walkthrough"]) <= 30
            assert task.target.lower() in content["grammar"].split("Your task is to: ")[1].split("\n")[0]
            assert (int(scene) in plan_numbers(unseen=True)) == (folder == "valid_unseen")


@needs_alfworld
def test_seen_and_unseen_rooms_share_no_floor_plan_and_both_allow_every_task_type() -> None:
    seen, unseen = plan_numbers(unseen=False), plan_numbers(unseen=True)
    assert set(seen).isdisjoint(unseen)
    assert (len(seen), len(unseen)) == (96, 24)
    for numbers in (seen, unseen):
        for task_type in TYPES:
            assert any(tasks_of(floor_plan(number), task_type) for number in numbers)


@needs_alfworld
def test_kitchens_have_what_heats_cools_and_cleans() -> None:
    for number in range(1, 31):
        kinds = {kind for _, kind in floor_plan(number).receptacles}
        assert {"Fridge", "Microwave", "SinkBasin"} <= kinds


def test_each_type_is_spread_evenly_over_the_games_of_a_split(games_root: Path, tmp_path: Path) -> None:
    for folder in ("train", "valid_seen", "valid_unseen"):
        types = [game.task_type for game in find_games(games_root, folder, TYPES)]
        assert all(set(types[first : first + 6]) == set(TaskType) for first in range(len(types) - 5))
    for source, copies in ((TaskType.PICK, 3), (TaskType.LOOK, 1)):
        (game,) = find_games(games_root, "valid_seen", (source,))
        for number in range(copies):
            shutil.copytree(game.folder, tmp_path / "json_2.1.1" / "train" / game.folder.parent.name / f"{number}")
    spread = [game.task_type for game in find_games(tmp_path, "train", TYPES)]
    assert spread == [TaskType.PICK, TaskType.PICK, TaskType.LOOK, TaskType.PICK]


def test_left_out_are_the_games_that_alfworld_leaves_out(tmp_path: Path) -> None:
    def write(name: str, solvable: bool = True, task_file: bool = True) -> None:
        folder = tmp_path / "json_2.1.1" / "train" / name / "trial_T1"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").write_text(json.dumps({"solvable": solvable}))
        if task_file:
            (folder / "traj_data.json").write_text("{}")

    write("pick_and_place_simple-Mug-None-Desk-301")
    write("pick_and_place_simple-AppleSliced-None-Fridge-2")
    write("pick_and_place_with_movable_recep-Mug-Bowl-Desk-301")
    write("pick_two_obj_and_place-Mug-None-Desk-301", solvable=False)
    write("look_at_obj_in_light-Mug-None-DeskLamp-301", task_file=False)
    write("pick_heat_then_place_in_recep-Mug-None-Cabinet-3")
    names = {game.name for game in find_games(tmp_path, "train", TYPES)}
    assert names == {
        "pick_and_place_simple-Mug-None-Desk-301/trial_T1",
        "pick_heat_then_place_in_recep-Mug-None-Cabinet-3/trial_T1",
    }
    only = find_games(tmp_path, "train", (TaskType.HEAT,))
    assert [game.task_type for game in only] == [TaskType.HEAT]
    with pytest.raises(UserError, match=r"valid_seen: no game of .*gflowvlm alfworld generate"):
        find_games(tmp_path, "valid_seen", TYPES)
    with pytest.raises(UserError, match=r"traj_data\.json: says no task"):
        only[0].task()
    write("pick_and_place_simple-Mug-None-Shelf-301")
    (game,) = tmp_path.glob("*/*/*Shelf*/*/game.tw-pddl")
    game.write_bytes(b"\xff\xfe")
    games_there.cache_clear()
    with pytest.raises(UserError, match=r"game\.tw-pddl: not a readable game"):
        find_games(tmp_path, "train", TYPES)


def test_official_data_is_found_where_the_variable_or_its_default_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert official_data() is None
    (tmp_path / ".cache/alfworld/json_2.1.1").mkdir(parents=True)
    assert official_data() == tmp_path / ".cache/alfworld"
    elsewhere = tmp_path / "data"
    monkeypatch.setenv("ALFWORLD_DATA", str(elsewhere))
    with pytest.raises(UserError, match=r"ALFWORLD_DATA=.*data: no folder json_2\.1\.1"):
        official_data()
    (elsewhere / "json_2.1.1").mkdir(parents=True)
    assert official_data() == elsewhere


STARTER = """
from gflowvlm.envs.household import starter
starter.GAMES = {"train": 6}
print(starter.starter_set())
"""


def test_two_processes_that_want_the_starter_set_at_once_make_it_once(tmp_path: Path) -> None:
    if find_spec("alfworld") is None:
        pytest.skip("make alfworld")
    environment = {
        "PYTHONPATH": str(Path(gflowvlm.__file__).parents[1]),
        "GFLOWVLM_CACHE": str(tmp_path),
        "HOME": "/tmp",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    root = tmp_path / "alfworld" / starter.NAME
    assert [out.strip() for out, _ in told] == [str(root)] * 2
    assert sorted("making a starter set" in errors for _, errors in told) == [False, True]
    assert len(find_games(root, "train", TYPES)) == 6


def test_starter_set_waits_for_its_maker_and_then_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GFLOWVLM_CACHE", str(tmp_path))
    monkeypatch.setattr(starter, "LONGEST_WAIT_S", 0.3)
    root = tmp_path / "alfworld" / starter.NAME
    root.mkdir(parents=True)
    with starter._alone(root / "lock"), pytest.raises(UserError, match=r"lock: waited .* starter games"):
        starter.starter_set()


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GFLOWVLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="GFLOWVLM_CACHE"):
        starter.starter_set()


@pytest.mark.parametrize("call", ["starter.starter_set()", "engine.GameEngine()"])
def test_packages_that_are_not_installed_are_named_with_what_installs_them(tmp_path: Path, call: str) -> None:
    code = f"""
import sys
sys.modules["alfworld"] = None
from gflowvlm.envs.household import engine, starter
from gflowvlm.shared.errors import UserError
try:
    {call}
except UserError as error:
    print(error)
"""
    environment = {
        "PYTHONPATH": str(Path(gflowvlm.__file__).parents[1]),
        "GFLOWVLM_CACHE": str(tmp_path),
        "HOME": "/tmp",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "package 'alfworld' is not installed; `make alfworld`" in done.stdout, done.stderr
