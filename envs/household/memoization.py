"""Keeps textworld from parsing the same texts at every step, and its planner's front end from side effects.

textworld parses every action template, feedback rule and query with a general parser each time it is
used, which is most of a step; copying what their variables stand for is most of the rest. Parsed texts
are kept and copies made only of what is changed; the tests compare whole games with and without.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import fast_downward
from textworld.envs.pddl import logic as pddl_logic
from textworld.envs.pddl import textgen
from textworld.logic import Rule

TEMPLATES = 4096
"""Parsed templates kept; a game has about a hundred."""
GAMES = 64
"""Parsed grammars and translated problems kept, one and two a game."""

PLANNER_LOCK = threading.RLock()
"""The translation from PDDL swaps `sys.argv` and `sys.stdout`: one thread at a time."""

_installed = False


def install() -> None:
    """Replaces textworld's parsing functions by ones that remember; once a process, repeated calls do nothing."""
    global _installed
    with PLANNER_LOCK:
        if _installed:
            return
        textgen._parse_and_convert = _remembering_templates(textgen._parse_and_convert)
        textgen.copy_context = _copy_context
        pddl_logic._parse_and_convert = lru_cache(GAMES)(pddl_logic._parse_and_convert)
        Rule.parse_conjunctive_query = staticmethod(lru_cache(TEMPLATES)(Rule.parse_conjunctive_query))
        fast_downward.pddl2sas = _remembering_translations(fast_downward.pddl2sas)
        _installed = True


def _remembering_templates(parse: Callable[..., Any]) -> Callable[..., Any]:
    remembered = lru_cache(TEMPLATES)(parse)

    def parse_again(*args: Any, **kwargs: Any) -> Any:
        # The caller writes the current state into the symbols it gets.
        return copy.deepcopy(remembered(*args, **kwargs))

    return parse_again


def _copy_context(context: dict[str, Any]) -> dict[str, Any]:
    """Returns a context whose bindings can be added to; what they bind is only read, so it is shared, not copied."""
    return {**context, "variables": dict(context["variables"]), "mapping": dict(context["mapping"])}


def _remembering_translations(translate: Callable[..., Any]) -> Callable[..., Any]:
    @lru_cache(2 * GAMES)
    def remembered(domain: str, problem: str, optimize: bool) -> Any:
        with _untouched_process():
            return translate(domain, problem, optimize=optimize)

    def translate_again(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> Any:
        with PLANNER_LOCK:
            return remembered(domain, problem, optimize)

    return translate_again


@contextmanager
def _untouched_process() -> Iterator[None]:
    arguments, output = sys.argv, sys.stdout
    try:
        yield
    finally:
        sys.argv, sys.stdout = arguments, output
