"""Making games from the floor plans in alfworld's wheel, in the layout and format of its own data."""

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from gflowvlm.envs.household.engine import GameEngine
from gflowvlm.envs.household.games import GAME_FILE, SEEN_FOLDER, TASK_FILE, TRAIN_FOLDER, UNSEEN_FOLDER, VERSION_FOLDER
from gflowvlm.envs.household.pddl import problem
from gflowvlm.envs.household.scenes import SIZES, Room, floor_plan, make_room, plan_numbers, tasks_of
from gflowvlm.envs.household.tasks import TaskType, sub_goals_reached
from gflowvlm.shared.errors import UserError

FOLDERS = (TRAIN_FOLDER, SEEN_FOLDER, UNSEEN_FOLDER)
LONGEST_PLAN = 30
"""Commands; leaves a few of the 35 steps for looking around and for the stop action."""
ATTEMPTS = 50


@dataclass(frozen=True)
class GameSpec:
    """Everything that fixes a generated game.

    Attributes:
        folder: ``train``, ``valid_seen`` or ``valid_unseen``.
        task_type: Its task type.
        size: One of `SIZES`.
        seed: Seed of the whole set.
        number: Its number among the set's games of this folder and type.
    """

    folder: str
    task_type: TaskType
    size: str
    seed: int
    number: int

    @property
    def trial(self) -> str:
        """Name of the game's innermost folder."""
        return f"trial_{self.size}_{self.seed}_{self.number:05d}"


def specs(
    games_per_folder: dict[str, int], size: str, seed: int, types: Sequence[TaskType] = tuple(TaskType)
) -> list[GameSpec]:
    """Returns the specs of a set whose task types are as equally frequent as can be.

    Args:
        games_per_folder: How many games each folder gets.
        size: One of `SIZES`.
        seed: Seed of the set.
        types: The task types, all six by default.
    """
    return [
        GameSpec(folder, types[index % len(types)], size, seed, index // len(types))
        for folder, count in games_per_folder.items()
        for index in range(count)
    ]


def missing(root: Path, wanted: Iterable[GameSpec]) -> list[GameSpec]:
    """Returns the specs whose games are not there yet."""
    present = {
        (folder, path.parent.parent.name.split("-")[0], path.parent.name)
        for folder in FOLDERS
        for path in (root / VERSION_FOLDER / folder).glob(f"*/*/{GAME_FILE}")
    }
    return [spec for spec in wanted if (spec.folder, spec.task_type.value, spec.trial) not in present]


def generate(root: Path, wanted: Iterable[GameSpec], workers: int) -> Iterator[Path]:
    """Makes games and yields the folder of each as it is finished; each appears on disk whole or not at all.

    Args:
        root: The folder that holds, or will hold, ``json_2.1.1``.
        wanted: The games to make.
        workers: Processes; with 1 this one does the work.

    Raises:
        UserError: A worker process died.
        OSError: A game cannot be written; nothing of it is left.
        RuntimeError: The floor plans allow no such game.
    """
    if workers == 1:
        yield from (_generate_one(root, spec) for spec in wanted)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker) as pool:
        jobs = [pool.submit(_generate_one, root, spec) for spec in wanted]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BrokenProcessPool:
            raise UserError(f"{root}: a worker process died, for lack of memory perhaps; fewer --workers?") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    # Ctrl-C and a closed terminal reach the whole process group; the workers finish their game, the parent stops
    # handing out more.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: the pool's queue would have it wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _engine() -> GameEngine:
    """The process's engine for trying games out."""
    return GameEngine()


def _generate_one(root: Path, spec: GameSpec) -> Path:
    _engine()  # First of all: it says in words what is not installed.
    numbers = plan_numbers(unseen=spec.folder == UNSEEN_FOLDER)
    key = [spec.seed, FOLDERS.index(spec.folder), list(TaskType).index(spec.task_type), spec.number]
    rng = np.random.default_rng(key)
    for _ in range(ATTEMPTS):
        plan = floor_plan(numbers[int(rng.integers(len(numbers)))])
        tasks = tasks_of(plan, spec.task_type)
        if len(tasks) == 0:
            continue
        room = make_room(plan, tasks[int(rng.integers(len(tasks)))], SIZES[spec.size], rng)
        game = _game(room, f"plan_{spec.trial}", rng)
        walkthrough = _solution(room, game)
        if walkthrough is not None:
            return _write(root, spec, room, {**game, "solvable": True, "walkthrough": walkthrough})
    raise RuntimeError(f"no game of {spec} in {ATTEMPTS} attempts")


def _game(room: Room, name: str, rng: np.random.Generator) -> dict[str, Any]:
    from alfworld.gen.goal_library import gdict
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    task = room.task
    templates = gdict[task.type.value]["templates"]
    names = {"obj": task.target.lower(), "recep": task.receptacle.lower(), "toggle": task.lamp.lower()}
    sentence = templates[int(rng.integers(len(templates)))].format(**names, mrecep="")
    return {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8"),
        "grammar": Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8").replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem(room, name),
    }


def _solution(room: Room, game: dict[str, Any]) -> list[str] | None:
    """Returns the planner's commands once they have been played to the goal, None for a game not worth keeping."""
    engine = _engine()
    engine.load(game)
    observation = engine.reset()
    # A goal that holds, or half holds, at the start would be no game.
    if sub_goals_reached(room.task, observation.facts, observation.won) > 0:
        return None
    plan = engine.plan()
    if not 0 < len(plan) <= LONGEST_PLAN:
        return None
    for command in plan:
        observation = engine.step(command)
    return list(plan) if observation.won else None


def _write(root: Path, spec: GameSpec, room: Room, game: dict[str, Any]) -> Path:
    task, number = room.task, room.plan.number
    name = f"{task.type.value}-{task.target}-None-{task.receptacle or task.lamp}-{number}"
    target = root / VERSION_FOLDER / spec.folder / name / spec.trial
    # The part of ALFRED's file that text games need; its 3-D scene is not known here.
    description = {
        "task_id": spec.trial,
        "task_type": task.type.value,
        "pddl_params": {
            "object_target": task.target,
            "parent_target": task.receptacle,
            "toggle_target": task.lamp,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{number}", "scene_num": number},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        (partial / GAME_FILE).write_text(json.dumps(game), encoding="utf-8")
        (partial / TASK_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")
        (partial / "initial_state.pddl").write_text(game["pddl_problem"], encoding="utf-8")
        partial.chmod(0o755)
        os.rename(partial, target)
    except OSError:
        # Another process may just have made the same game.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
