"""Every public name says what it is and shows how it is used; the examples run."""

import doctest
import inspect
import re
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import gflowvlm

TRAINS = doctest.register_optionflag("TRAINS")
"""Marks examples that start a training."""

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NAMES = ("gflowvlm", *gflowvlm.__all__)


def public(name: str) -> list[tuple[str, object]]:
    """A name with the methods and properties that it shows, as (dotted name, object)."""
    thing = gflowvlm if name == "gflowvlm" else getattr(gflowvlm, name)
    found: list[tuple[str, object]] = [(name, thing)]
    if inspect.isclass(thing) and thing.__module__.startswith("gflowvlm.api"):
        shown = ((n, m) for n, m in vars(thing).items() if not n.startswith("_"))
        found += [(f"{name}.{n}", m) for n, m in shown if isinstance(m, (FunctionType, property))]
    return found


def examples(name: str) -> list[doctest.DocTest]:
    parser = doctest.DocTestParser()
    globs = {"gflowvlm": gflowvlm}
    documented = [(n, inspect.getdoc(thing) or "") for n, thing in public(name)]
    return [parser.get_doctest(text, dict(globs), n, None, 0) for n, text in documented if ">>>" in text]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    assert [n for n, thing in public(name) if not inspect.getdoc(thing)] == []
    assert ">>>" in (inspect.getdoc(public(name)[0][1]) or "")


@pytest.mark.parametrize("name", ["Run", "Policy"])
def test_a_method_shows_how_it_is_called(name: str) -> None:
    methods = [(n, m) for n, m in public(name) if isinstance(m, FunctionType) and n != "Policy.close"]
    assert [n for n, m in methods if ">>>" not in (inspect.getdoc(m) or "")] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_say_what_happens(
    name: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in examples(name):
        example.examples = [e for e in example.examples if not e.options.get(TRAINS)]
        check(example, path=str(finished_run))


@pytest.mark.slow
def test_the_examples_that_train_say_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = [e for name in NAMES for e in examples(name) if any(x.options.get(TRAINS) for x in e.examples)]
    assert len(training) > 0
    for number, example in enumerate(training):
        check(example, folder=str(tmp_path / str(number)))


def check(example: doctest.DocTest, **names: str) -> None:
    said: list[str] = []
    example.globs.update(names)
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_losses_are_those_that_the_learner_takes() -> None:
    from gflowvlm.learner import losses

    assert isinstance(gflowvlm.losses, ModuleType)
    assert {name: getattr(gflowvlm.losses, name) for name in gflowvlm.losses.__all__} == {
        name: getattr(losses, name) for name in losses.__all__
    }


def test_the_version_is_the_projects() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    stated = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert stated is not None
    assert gflowvlm.__version__ == stated[1]
