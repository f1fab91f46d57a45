"""A room as a planning problem in PDDL, with the names and facts of ALFWorld's own games."""

from collections.abc import Iterator

from gflowvlm.envs.household.scenes import Room, affords, holdable

AFFORDANCES = {"Heatable": "heatable", "Coolable": "coolable", "Cleanable": "cleanable", "Sliceable": "sliceable"}
MANGLED = {"|": "_bar_", "-": "_minus_", "+": "_plus_", ".": "_dot_"}


def problem(room: Room, name: str) -> str:
    """Returns the problem's text.

    Args:
        room: The room and its task.
        name: The problem's name in PDDL.
    """
    from alfworld.gen.goal_library import gdict

    task = room.task
    goal = gdict[task.type.value]["pddl"].format(obj=task.target, recep=task.receptacle, toggle=task.lamp)
    lines = [f"(define (problem {name})", "(:domain alfred)", "(:objects", "agent1 - agent"]
    lines += [f"{kind}Type - otype" for kind in sorted({kind for _, kind, _ in room.objects})]
    lines += [f"{kind}Type - rtype" for kind in sorted({kind for _, kind in room.receptacles})]
    lines += [f"loc{index} - location" for index in range(len(room.receptacles) + 1)]
    lines += [f"{pddl_name(r)} - receptacle" for r, _ in room.receptacles]
    lines += [f"{pddl_name(o)} - object" for o, _, _ in room.objects]
    lines += [")", "(:init", "(= (total-cost) 0)", *_facts(room), ")"]
    # The library writes its types with "#", for its own formatting.
    return "\n".join(lines) + goal.replace("#", "-")


def pddl_name(identifier: str) -> str:
    """Returns an id as PDDL spells it, which alfworld turns into names like ``apple 1``."""
    return "".join(MANGLED.get(character, character) for character in identifier)


def _facts(room: Room) -> Iterator[str]:
    from alfworld.gen import constants

    # Location 0 holds nothing: the agent begins in the middle of the room.
    location = {place: f"loc{index}" for index, (place, _) in enumerate(room.receptacles, start=1)}
    yield "(atLocation agent1 loc0)"
    things = {kind for _, kind, _ in room.objects}
    for kind in sorted({kind for _, kind in room.receptacles}):
        yield from (f"(canContain {kind}Type {thing}Type)" for thing in sorted(holdable(kind) & things))
    for place, kind in room.receptacles:
        yield f"(receptacleType {pddl_name(place)} {kind}Type)"
        yield f"(receptacleAtLocation {pddl_name(place)} {location[place]})"
        if kind in constants.OPENABLE_CLASS_SET:
            yield f"(openable {pddl_name(place)})"
    for thing, kind, place in room.objects:
        yield f"(objectType {pddl_name(thing)} {kind}Type)"
        yield f"(inReceptacle {pddl_name(thing)} {pddl_name(place)})"
        yield f"(objectAtLocation {pddl_name(thing)} {location[place]})"
        yield f"({'toggleable' if kind == room.task.lamp else 'pickupable'} {pddl_name(thing)})"
        yield from (
            f"({predicate} {pddl_name(thing)})" for word, predicate in AFFORDANCES.items() if kind in affords(word)
        )
