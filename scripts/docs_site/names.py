"""Finds files and modules that a text names and the project does not have."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from docs_site.examples import code_of

PACKAGE = "gflowvlm"
_DOTTED = re.compile(rf"(?<![\w./@-]){PACKAGE}((?:\.[A-Za-z_]\w*)+)(:\w+)?(?![\w/-])")
_IMPORT = re.compile(rf"^\s*from ({PACKAGE}[\w.]*) import ([\w, ]+)$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"[A-Z]{2,}|…")
_FILE_ENDINGS = ("py", "md", "yaml", "html", "json", "js", "css", "txt", "svg", "png")


def page_problems(files: Iterable[Path], root: Path) -> list[str]:
    """Returns a line for each path or module that Markdown files name as code and the tree does not have.

    A path is what begins with a top-level folder of the tree; words in capitals and `*` in it stand for anything.

    Args:
        files: The files.
        root: The project's folder.
    """
    path = _path_pattern(root, r"[\w./*…-]*")
    return [
        f"{file.relative_to(root)}:{line}: {problem}"
        for file in files
        for line, code in code_of(file)
        for problem in (*_missing_paths(path, code, root), *_missing_modules(code, root))
    ]


def source_problems(files: Iterable[Path], root: Path) -> list[str]:
    """Returns a line for each file that sources name, in comments or anywhere else, and the tree does not have.

    Args:
        files: The sources.
        root: The project's folder.
    """
    path = _path_pattern(root, rf"[\w./*-]*\.(?:{'|'.join(_FILE_ENDINGS)})\b")
    return [
        f"{file.relative_to(root)}:{number}: {problem}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        for problem in _missing_paths(path, line, root)
    ]


def _path_pattern(root: Path, rest: str) -> re.Pattern[str]:
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] not in "._" and p.name != "runs")
    return re.compile(rf"(?<![\w./~$}}>-])(?:{'|'.join(folders)})/{rest}")


def _missing_paths(pattern: re.Pattern[str], text: str, root: Path) -> Iterator[str]:
    for found in pattern.findall(text):
        wanted = _PLACEHOLDER.sub("*", found.rstrip(".")).rstrip("/")
        if not any(root.glob(wanted)):
            yield f"there is no {found}"


def _missing_modules(text: str, root: Path) -> Iterator[str]:
    names = [f"{PACKAGE}{dotted}{attribute.replace(':', '.')}" for dotted, attribute in _DOTTED.findall(text)]
    for module, imported in _IMPORT.findall(text):
        names += [f"{module}.{name.strip()}" for name in imported.split(",")]
    yield from (f"there is no {name}" for name in names if not _exists(root, tuple(name.split("."))))


@cache
def _exists(root: Path, parts: tuple[str, ...]) -> bool:
    """Whether a dotted name is a package, a module, or is defined in one."""
    place = root
    for index, part in enumerate(parts):
        module = place / f"{part}.py"
        if (place / part / "__init__.py").is_file():
            place = place / part
            continue
        if not module.is_file():
            module, index = place / "__init__.py", index - 1
        attributes = parts[index + 1 :]
        text = module.read_text(encoding="utf-8") if module.is_file() else ""
        # What a package shows of a module of its own: members of it stand there.
        first = attributes[0] if attributes else ""
        shown = re.search(rf"^\s*from ({PACKAGE}\.[\w.]+) import {first}\b", text, re.MULTILINE)
        if first and shown is not None:
            return _exists(root, (*shown[1].split("."), *attributes))
        return all(re.search(rf"\b{attribute}\b", text) is not None for attribute in attributes)
    return True
