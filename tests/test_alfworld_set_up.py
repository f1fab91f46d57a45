"""ALFWorld's extra: what is pinned, and that it changes nothing that the rest pins."""

import importlib.metadata as metadata
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def pins(name: str) -> dict[str, str]:
    """The versions of a constraints file by canonical name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


def extra() -> list[Requirement]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [Requirement(text) for text in table["project"]["optional-dependencies"]["alfworld"]]


def test_extra_is_pinned_within_its_bounds_and_apart_from_the_rest() -> None:
    ours, rest = pins("constraints-alfworld.txt"), pins("constraints.txt")
    assert ours.keys().isdisjoint(rest)
    for requirement in extra():
        assert requirement.specifier.contains(ours[canonicalize_name(requirement.name)])


@pytest.mark.skipif(find_spec("alfworld") is None, reason="make alfworld")
def test_both_locks_together_meet_every_requirement_of_the_extra() -> None:
    """`make alfworld` installs the lock without resolving, so a gap, or a clash with the rest, would stay open."""
    pinned = {**pins("constraints.txt"), **pins("constraints-alfworld.txt")}
    todo, seen, wrong = extra(), set(), []
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
    assert len(seen) > 25
