"""What the agent sees where it stands, read off the facts."""

import re
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass

from gflowvlm.envs.household.engine import Fact

# In the order in which they are shown. `ison` and the negated facts are unreliable, so neither is read.
MARKS = {"ishot": "hot", "iscool": "cold", "isclean": "clean", "issliced": "sliced", "istoggled": "on"}


@dataclass(frozen=True)
class Thing:
    """A thing in sight.

    Attributes:
        name: Its name, ``apple 1``.
        marks: What can be seen of its state: hot, cold, clean, sliced, on.
    """

    name: str
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A receptacle.

    Attributes:
        name: Its name, ``fridge 1``.
        closed: Whether it is closed; what is in it is then out of sight.
        openable: Whether it can be opened and closed.
        things: What is seen in or on it, in the order of their names.
    """

    name: str
    closed: bool
    openable: bool
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class View:
    """What the agent sees.

    Attributes:
        here: The receptacles before the agent; none in the middle of the room.
        room: The names of all receptacles.
        held: What the agent holds.
    """

    here: tuple[Place, ...]
    room: tuple[str, ...]
    held: tuple[Thing, ...]


def view(facts: Set[Fact]) -> View:
    """Returns what the agent sees."""
    by_predicate: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_predicate[fact[0]].append(fact)
    marks = {word: {fact[1] for fact in by_predicate[predicate]} for predicate, word in MARKS.items()}

    def thing(name: str) -> Thing:
        return Thing(name, tuple(word for word, names in marks.items() if name in names))

    def place(name: str) -> Place:
        openable = ("openable", name) in facts
        closed = openable and ("opened", name) not in facts
        inside = [fact[1] for fact in by_predicate["inreceptacle"] if fact[2] == name]
        return Place(name, closed, openable, () if closed else tuple(thing(o) for o in in_order(inside)))

    locations = {fact[2] for fact in by_predicate["atlocation"]}
    receptacles = by_predicate["receptacleatlocation"]
    return View(
        here=tuple(place(name) for name in in_order([fact[1] for fact in receptacles if fact[2] in locations])),
        room=tuple(in_order([fact[1] for fact in receptacles])),
        held=tuple(thing(name) for name in in_order([fact[2] for fact in by_predicate["holds"]])),
    )


def kind_of(name: str) -> str:
    """Returns ``apple`` of ``apple 1``."""
    return name.split(" ")[0]


def in_order(names: list[str]) -> list[str]:
    """Returns names sorted by kind and number."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
