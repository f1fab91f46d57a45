"""The extras with a lock of their own: what is pinned, and that it changes nothing that the rest pins."""

import importlib.metadata as metadata
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("alfworld", "docs")
IMPORTED = {"alfworld": "alfworld", "docs": "sphinx"}
every_extra = pytest.mark.parametrize("extra", EXTRAS)


def pins(name: str) -> dict[str, str]:
    """The versions of a constraints file by canonical name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


def asked_for(extra: str) -> list[Requirement]:
    """What an extra asks for."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [Requirement(text) for text in table["project"]["optional-dependencies"][extra]]


@every_extra
def test_extra_is_pinned_within_its_bounds_and_apart_from_the_rest(extra: str) -> None:
    ours, rest = pins(f"constraints-{extra}.txt"), pins("constraints.txt")
    assert ours.keys().isdisjoint(rest)
    for requirement in asked_for(extra):
        assert requirement.specifier.contains(ours[canonicalize_name(requirement.name)])


def test_what_two_extras_pin_is_one_version() -> None:
    first, second = (pins(f"constraints-{extra}.txt") for extra in EXTRAS)
    assert {name: first[name] for name in first.keys() & second} == {n: second[n] for n in first.keys() & second}


@every_extra
def test_its_lock_and_the_rest_together_meet_every_requirement(extra: str) -> None:
    """`make alfworld` and `make docs` install the lock without resolving: a gap, or a clash, would stay open."""
    if find_spec(IMPORTED[extra]) is None:
        pytest.skip(f"make {extra}")
    own = pins(f"constraints-{extra}.txt")
    pinned = {**pins("constraints.txt"), **own}
    todo, seen, wrong = asked_for(extra), set(), []
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        wanted = frozenset(requirement.extras)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        if name not in pinned or not requirement.specifier.contains(pinned[name]):
            wrong.append(str(requirement))
            continue
        for text in metadata.requires(name) or []:
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in (wanted or {""})):
                todo.append(child)
    assert wrong == []
    assert own.keys() <= {name for name, _ in seen}, "pinned, and asked for by nothing"
