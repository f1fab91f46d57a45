"""What is seen, read off facts written by hand, and its picture. Needs no alfworld."""

import itertools

import numpy as np
import pytest

from gflowvlm.envs.household.engine import Fact, Observation
from gflowvlm.envs.household.prompts import MAX_STATE_CHARS, goal, state_text
from gflowvlm.envs.household.rendering import draw
from gflowvlm.envs.household.tasks import SUB_GOALS, Task, TaskType, sub_goals_reached
from gflowvlm.envs.household.view import Place, Thing, View, in_order, view

ROOM: frozenset[Fact] = frozenset(
    {
        ("atlocation", "agent1", "loc1"),
        ("receptacleatlocation", "fridge 1", "loc1"),
        ("receptacleatlocation", "countertop 2", "loc2"),
        ("receptacletype", "fridge 1", "fridgetype"),
        ("receptacletype", "countertop 2", "countertoptype"),
        ("openable", "fridge 1"),
        ("inreceptacle", "egg 10", "fridge 1"),
        ("inreceptacle", "egg 9", "fridge 1"),
        ("inreceptacle", "mug 1", "countertop 2"),
        ("objecttype", "egg 10", "eggtype"),
        ("objecttype", "egg 9", "eggtype"),
        ("objecttype", "mug 1", "mugtype"),
        ("holds", "agent1", "lamp 1"),
        ("istoggled", "lamp 1"),
        ("iscool", "egg 9"),
    }
)


def test_closed_receptacle_hides_what_is_in_it_and_open_one_shows_it_with_its_state() -> None:
    assert view(ROOM).here == (Place("fridge 1", True, True, ()),)
    things = (Thing("egg 9", ("cold",)), Thing("egg 10", ()))
    assert view(ROOM | {("opened", "fridge 1")}).here == (Place("fridge 1", False, True, things),)
    assert view(ROOM).held == (Thing("lamp 1", ("on",)),)


def test_other_places_are_known_by_name_only() -> None:
    middle = view((ROOM - {("atlocation", "agent1", "loc1")}) | {("atlocation", "agent1", "loc0")})
    assert middle.here == ()
    assert middle.room == ("countertop 2", "fridge 1")


def test_names_are_ordered_by_kind_and_number() -> None:
    assert in_order(["mug 2", "egg 10", "egg 9", "mug 1"]) == ["egg 9", "egg 10", "mug 1", "mug 2"]


HOLDS, IN, OTHER = ("holds", "agent1", "egg 9"), ("inreceptacle", "egg 9", "countertop 2"), ("holds", "agent1", "mug 1")


@pytest.mark.parametrize(
    ("kind", "added", "won", "reached"),
    [
        (TaskType.PICK, set(), False, 0),
        (TaskType.PICK, {HOLDS}, False, 1),
        (TaskType.PICK, {OTHER}, False, 0),
        (TaskType.PICK, {IN}, True, 2),
        (TaskType.HEAT, {("iscool", "egg 9")}, False, 0),
        (TaskType.HEAT, {IN}, False, 0),
        (TaskType.HEAT, {HOLDS}, False, 1),
        (TaskType.HEAT, {HOLDS, ("ishot", "egg 9")}, False, 2),
        (TaskType.HEAT, {HOLDS, ("ishot", "mug 1")}, False, 1),
        (TaskType.HEAT, {IN, ("ishot", "egg 9")}, True, 3),
        (TaskType.CLEAN, {HOLDS, ("isclean", "egg 9")}, False, 2),
        (TaskType.COOL, {HOLDS}, False, 2),
        (TaskType.PICK_TWO, {HOLDS}, False, 1),
        (TaskType.PICK_TWO, {IN}, False, 2),
        (TaskType.PICK_TWO, {IN, ("holds", "agent1", "egg 10")}, False, 3),
        (TaskType.PICK_TWO, {IN, ("inreceptacle", "egg 10", "countertop 2")}, True, 4),
        (TaskType.LOOK, {HOLDS}, False, 1),
        (TaskType.LOOK, {("istoggled", "desklamp 1")}, False, 1),
        (TaskType.LOOK, {HOLDS, ("istoggled", "desklamp 1")}, False, 1),
        (TaskType.LOOK, {HOLDS, ("istoggled", "desklamp 1")}, True, 2),
    ],
)
def test_sub_goals_are_counted_from_the_facts(kind: TaskType, added: set[Fact], won: bool, reached: int) -> None:
    task = Task(kind, "Egg", "" if kind is TaskType.LOOK else "CounterTop", "DeskLamp" if kind is TaskType.LOOK else "")
    facts = ROOM | {("objecttype", "desklamp 1", "desklamptype")} | added
    assert sub_goals_reached(task, facts, won) == reached <= SUB_GOALS[kind]


def test_every_difference_that_matters_is_in_the_picture() -> None:
    things = (Thing("egg 1", ()), Thing("mug 1", ()))
    views = [View((), ("fridge 1", "sofa 1"), held) for held in ((), (Thing("egg 1", ()),))]
    for name, held, mark in itertools.product(("fridge 1", "fridge 2"), ((), things[:1]), ((), ("hot",), ("cold",))):
        marked = (Thing("mug 1", mark),)
        views.append(View((Place(name, False, True, marked),), (), held))
        views.append(View((Place(name, False, True, things + marked),), (), held))
    views += [View((Place("fridge 1", closed, True, ()),), (), ()) for closed in (True, False)]
    views += [View((Place("desk 1", False, False, (Thing("desklamp 1", mark),)),), (), ()) for mark in ((), ("on",))]
    views += [View((), (), (Thing("mug 1", mark),)) for mark in (("clean",), ("hot", "clean"), ())]
    pictures = [draw(each, 300).tobytes() for each in views if each.here or each.room or each.held]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("size", [32, 64, 100, 300, 1024])
def test_picture_can_be_drawn_at_every_size_and_however_full_the_place(size: int) -> None:
    names = tuple(f"{kind} {n}" for kind in ("countertop", "cabinet", "unheardof") for n in range(1, 15))
    things = tuple(Thing(f"peppershaker {n}", ("hot", "clean", "sliced")) for n in range(1, 40))
    places = tuple(Place(name, False, name.startswith("cabinet"), things) for name in names[:3] + names[14:15])
    for each in (View((), names, things[:2]), View((), (), ()), View(places, names, ()), View(places[:1], names, ())):
        picture = draw(each, size)
        assert (picture.size, picture.mode) == ((size, size), "RGB")
        assert np.asarray(picture).std() > 1


def test_same_view_is_the_same_picture() -> None:
    assert draw(view(ROOM), 300).tobytes() == draw(view(ROOM), 300).tobytes()


def test_game_texts_become_one_line_and_stay_short() -> None:
    intro = "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in a room.\n\nYour task is to: put a mug in desk."
    first = Observation(intro, (), False, frozenset())
    assert state_text(first) == "You are in a room."
    assert goal(first).startswith("Your task is to: put a mug in desk. ")
    long = state_text(Observation("\nhelp " * 400, (), False, frozenset()))
    assert len(long) == MAX_STATE_CHARS
    assert "\n" not in long
