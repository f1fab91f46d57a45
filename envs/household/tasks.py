"""The six task types and their sub-goals, read off the facts."""

from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum

from gflowvlm.envs.household.engine import Fact


class TaskType(StrEnum):
    """ALFWorld's task types, by the names its data uses."""

    PICK = "pick_and_place_simple"
    LOOK = "look_at_obj_in_light"
    CLEAN = "pick_clean_then_place_in_recep"
    HEAT = "pick_heat_then_place_in_recep"
    COOL = "pick_cool_then_place_in_recep"
    PICK_TWO = "pick_two_obj_and_place"


TREATED = {TaskType.CLEAN: "isclean", TaskType.HEAT: "ishot", TaskType.COOL: "iscool"}
"""The fact that the target must have, by task type."""

SUB_GOALS = {
    TaskType.PICK: 2,
    TaskType.LOOK: 2,
    TaskType.CLEAN: 3,
    TaskType.HEAT: 3,
    TaskType.COOL: 3,
    TaskType.PICK_TWO: 4,
}
"""How many sub-goals a task type has; all of them are reached where the goal is."""


@dataclass(frozen=True)
class Task:
    """What is to be done.

    Attributes:
        type: The task type.
        target: Type of the object, as in ``Apple``.
        receptacle: Type of the receptacle it belongs in; empty where it is to be looked at.
        lamp: Type of the lamp to look at it under; empty elsewhere.
    """

    type: TaskType
    target: str
    receptacle: str
    lamp: str


def sub_goals_reached(task: Task, facts: Set[Fact], won: bool) -> int:
    """Returns how many sub-goals hold, 0..SUB_GOALS; all of them exactly where the goal holds.

    * pick: the target is held or in place; it is in place.
    * clean, heat, cool: the target is held, or treated; it is treated; it is treated and in place.
    * pick two: the same as pick for each of two targets, in one receptacle.
    * look: the target is held; the lamp is on.
    """
    if won:
        return SUB_GOALS[task.type]
    targets = {fact[1] for fact in facts if fact[0] == "objecttype" and fact[2] == f"{task.target.lower()}type"}
    held = {fact[2] for fact in facts if fact[0] == "holds"} & targets
    if task.type is TaskType.LOOK:
        lamps = {fact[1] for fact in facts if fact[0] == "objecttype" and fact[2] == f"{task.lamp.lower()}type"}
        reached = (len(held) > 0) + any(("istoggled", lamp) in facts for lamp in lamps)
        # Target held and lamp on, yet not won: the agent has left the lamp.
        return min(reached, SUB_GOALS[task.type] - 1)
    places = {fact[1] for fact in facts if fact[0] == "receptacletype" and fact[2] == f"{task.receptacle.lower()}type"}
    inside = [(fact[1], fact[2]) for fact in facts if fact[0] == "inreceptacle" and fact[2] in places]
    if task.type in TREATED:
        treated = {fact[1] for fact in facts if fact[0] == TREATED[task.type]} & targets
        return 2 if treated else int(len(held) > 0)
    if task.type is TaskType.PICK:
        return int(len(held) > 0)
    most = max((sum(o in targets and r == place for o, r in inside) for place in places), default=0)
    return min(2 * most + (len(held) > 0), SUB_GOALS[task.type] - 1)
