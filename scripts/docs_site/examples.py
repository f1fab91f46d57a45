"""Finds commands in Markdown files that the code does not know: what a reader types from a page has to work."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from docs_site.commands import NAME, commands_of
from docs_site.configuration import configuration_page
from gflowvlm.cli.main import app

_COMMAND = re.compile(rf"(?:^|(?<=[\s(])|(?<=bin/)){NAME} ([^\n|&;>]*)", re.MULTILINE)
_KUBECTL = re.compile(r"kubectl [^\n]*? -- |kubectl [^\n]*")
"""Up to what it runs in a pod: the namespace and the cluster have our name too."""
_MAKE = re.compile(r"^make ([a-z][a-z-]*)", re.MULTILINE)
_TARGET = re.compile(r"^([a-z-]+):.*## ", re.MULTILINE)
_SETTING = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)+)=")
_ROW = re.compile(r"^\| `([a-z_0-9.]+)` \|", re.MULTILINE)
_PLACEHOLDERS = {"COMMAND", "…", "..."}


def example_problems(files: Iterable[Path], makefile: str) -> list[str]:
    """Returns a line for each command, option, setting or target of make in Markdown files that does not exist.

    Looked at is what stands as code. Names in capitals and `…` stand for anything.

    Args:
        files: The files.
        makefile: Text of the Makefile.
    """
    root = typer.main.get_command(app)
    options = {
        path.removeprefix(f"{NAME} "): {"--help"}
        | {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for path, command, _ in commands_of(root, typer.Context(root, info_name=NAME))
    }
    settings = set(_ROW.findall(configuration_page()))
    targets = set(_TARGET.findall(makefile))
    problems = []
    for file in files:
        for line, code in code_of(file):
            found = [
                problem
                for typed in _COMMAND.findall(_KUBECTL.sub("", code))
                for problem in _problems(typed.split(), options, settings)
            ]
            found += [f"make has no target {target}" for target in _MAKE.findall(code) if target not in targets]
            problems += [f"{file.name}:{line}: {problem}" for problem in found]
    return problems


def _problems(words: list[str], options: dict[str, set[str]], settings: set[str]) -> Iterator[str]:
    words = [word.strip("[]`'\"") for word in words]
    if not words or words[0] in _PLACEHOLDERS:
        return
    groups = {path.split()[0] for path in options if " " in path}
    if words[0] in groups and len(words) == 1:
        return
    command = " ".join(words[:2]) if words[0] in groups else words[0]
    if words[0] != "--help" and command not in options:
        yield f"there is no command {NAME} {command}"
        return
    for word in words[1:]:
        option = word.partition("=")[0]
        if option.startswith("-") and option.strip("-") and option not in options[command]:
            yield f"{NAME} {command} has no option {option}"
        setting = _SETTING.match(word)
        if setting is not None and setting[1] not in settings:
            yield f"there is no setting {setting[1]}"


def code_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of each block and each span of code; a line that ends in a backslash goes on."""
    for token in MarkdownIt().enable("table").parse(file.read_text(encoding="utf-8")):
        line = 1 if token.map is None else token.map[0] + 1
        if token.type in ("fence", "code_block"):
            yield line, token.content.replace("\\\n", " ")
        spans: list[Token] = token.children or []
        yield from ((line, child.content) for child in spans if child.type == "code_inline")
