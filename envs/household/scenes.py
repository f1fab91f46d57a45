"""Rooms with things in them, made from the floor plans in alfworld's wheel."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from gflowvlm.envs.household.tasks import Task, TaskType

LAMP = "DeskLamp"
LAMP_PLACES = ("Desk", "SideTable", "Dresser", "Shelf")
MAX_COPIES = 3
"""Most things of one type in a room, as in ALFRED."""


@dataclass(frozen=True)
class Size:
    """How much stands in a room, at most.

    Attributes:
        receptacles: Places to go to.
        objects: Things that can be taken.
    """

    receptacles: int
    objects: int


SIZES = {"small": Size(6, 6), "full": Size(30, 30)}
"""Small games plan and step fast; full ones use the whole floor plan."""


@dataclass(frozen=True)
class FloorPlan:
    """One of the 120 rooms.

    Attributes:
        number: ALFRED's number of the plan.
        receptacles: ``(id, type)`` of everything things can be put in or on, sorted.
        objects: Types of the things that belong into the room, sorted.
    """

    number: int
    receptacles: tuple[tuple[str, str], ...]
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """A floor plan with things in it, and a task.

    Attributes:
        plan: The floor plan.
        task: What is to be done.
        receptacles: ``(id, type)`` of the places of this room.
        objects: ``(id, type, receptacle id)`` of the things.
    """

    plan: FloorPlan
    task: Task
    receptacles: tuple[tuple[str, str], ...]
    objects: tuple[tuple[str, str, str], ...]


def plan_numbers(unseen: bool) -> list[int]:
    """Returns the floor plans of the seen or unseen rooms: ALFRED's own division, 24 and 6 a room type."""
    from alfworld.gen import constants

    return sorted(constants.TEST_SCENE_NUMBERS if unseen else constants.TRAIN_SCENE_NUMBERS)


@cache
def floor_plan(number: int) -> FloorPlan:
    """Returns a floor plan of the wheel."""
    from alfworld.gen import constants

    folder = files("alfworld.gen") / "layouts"
    names = json.loads((folder / f"FloorPlan{number}-openable.json").read_text(encoding="utf-8"))
    types = json.loads((folder / f"FloorPlan{number}-objects.json").read_text(encoding="utf-8"))
    # A basin is named after what it is part of: Sink|x|y|z|SinkBasin. One plan has a sink's in its bathtub.
    places = [(name, name.split("|")[-1] if name.endswith("Basin") else name.split("|")[0]) for name in sorted(names)]
    places = [(name, kind) for name, kind in places if kind.startswith(name.split("|")[0])]
    return FloorPlan(
        number,
        tuple((name, kind) for name, kind in places if kind in constants.VAL_RECEPTACLE_OBJECTS),
        tuple(sorted(set(types) & set(constants.OBJECTS) - {LAMP})),
    )


def holdable(receptacle: str) -> frozenset[str]:
    """Returns the types of things that a type of receptacle can hold."""
    from alfworld.gen import constants

    return frozenset(constants.VAL_RECEPTACLE_OBJECTS[receptacle])


def affords(action: str) -> frozenset[str]:
    """Returns the types of things that are ``Heatable``, ``Coolable``, ``Cleanable``, ``Sliceable``."""
    from alfworld.gen import constants

    return frozenset(constants.VAL_ACTION_OBJECTS[action])


APPLIANCES = {
    TaskType.CLEAN: ("SinkBasin", "Cleanable"),
    TaskType.HEAT: ("Microwave", "Heatable"),
    TaskType.COOL: ("Fridge", "Coolable"),
}
"""What treats the target, and what the target must afford."""


def tasks_of(plan: FloorPlan, task_type: TaskType) -> list[Task]:
    """Returns the tasks of a type that a floor plan allows, in a fixed order."""
    kinds = sorted({kind for _, kind in plan.receptacles})
    if task_type is TaskType.LOOK:
        if not set(kinds) & set(LAMP_PLACES) or plan.number < 200 or plan.number > 400:
            return []
        movable = [o for o in plan.objects if any(o in holdable(kind) for kind in kinds)]
        return [Task(task_type, target, "", LAMP) for target in movable]
    appliance, affordance = APPLIANCES.get(task_type, ("", ""))
    if appliance and appliance not in kinds:
        return []
    targets = [o for o in plan.objects if not affordance or o in affords(affordance)]
    return [
        Task(task_type, target, kind, "")
        for target in targets
        for kind in kinds
        # The target must have somewhere else to be at first, and a treatment must not already put it in place.
        if kind != appliance and target in holdable(kind) and any(target in holdable(k) for k in kinds if k != kind)
    ]


def make_room(plan: FloorPlan, task: Task, size: Size, rng: np.random.Generator) -> Room:
    """Returns a room in which the task is open: targets stand away from where they belong."""
    receptacles = _places(plan, task, size, rng)
    counts: dict[str, int] = defaultdict(int)
    objects: list[tuple[str, str, str]] = []

    def put(kind: str, choices: Sequence[tuple[str, str]]) -> None:
        place, _ = choices[int(rng.integers(len(choices)))]
        counts[kind] += 1
        # Coordinates only have to be different; the game's names come from their order.
        x, y, z = (f"{v:+06.2f}" for v in rng.uniform(-3, 3, 3))
        objects.append((f"{kind}|{x}|{y}|{z}", kind, place))

    for _ in range(2 if task.type is TaskType.PICK_TWO else 1):
        put(task.target, [r for r in receptacles if r[1] != task.receptacle and task.target in holdable(r[1])])
    if task.lamp:
        put(task.lamp, [r for r in receptacles if r[1] in LAMP_PLACES])
    others = [o for o in plan.objects if o != task.target and any(o in holdable(kind) for _, kind in receptacles)]
    while others and len(objects) < size.objects:
        kind = others[int(rng.integers(len(others)))]
        put(kind, [r for r in receptacles if kind in holdable(r[1])])
        others = [o for o in others if counts[o] < MAX_COPIES]
    return Room(plan, task, receptacles, tuple(sorted(objects)))


def _places(plan: FloorPlan, task: Task, size: Size, rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    """Returns what the task needs and, up to the size, more of the plan's receptacles."""

    def one(kinds: Sequence[str] | frozenset[str]) -> tuple[str, str]:
        choices = [r for r in plan.receptacles if r[1] in kinds]
        return choices[int(rng.integers(len(choices)))]

    homes = [kind for _, kind in plan.receptacles if kind != task.receptacle and task.target in holdable(kind)]
    chosen = {one(homes)}
    if task.receptacle:
        chosen.add(one((task.receptacle,)))
    if task.lamp:
        chosen.add(one(LAMP_PLACES))
    if task.type in APPLIANCES:
        chosen.add(one((APPLIANCES[task.type][0],)))
    for index in rng.permutation(len(plan.receptacles)):
        if len(chosen) >= size.receptacles:
            break
        chosen.add(plan.receptacles[index])
    return tuple(sorted(chosen))
