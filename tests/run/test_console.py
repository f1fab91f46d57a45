"""What commands print stands there as it is, whatever brackets, colons or control characters it holds."""

import ast
import io
from pathlib import Path

import pytest
from rich.table import Table

from gflowvlm.run.console import printable, terminal

ROOMS = (Path(__file__).parents[2] / "gflowvlm").resolve()
TRICKY = ["lr[/1e-3]", "try[lr=1e-3]", "[red]", "a:smile:b", "läuf/日本", "[link=x]y[/link]"]


@pytest.mark.parametrize("text", TRICKY)
def test_text_is_printed_as_it_is_also_in_tables_and_rules(text):
    console = terminal()
    console.file = io.StringIO()
    console.width = 200
    table = Table("head " + text, title="title " + text, caption="caption " + text)
    table.add_row("cell " + text)
    console.print("line " + text)
    console.print(table)
    console.rule("rule " + text)
    printed = console.file.getvalue()
    for where in ("head", "title", "caption", "cell", "line", "rule"):
        assert f"{where} {text}" in printed


def test_what_a_terminal_would_act_upon_is_shown_as_an_escape():
    assert printable("a\x1b[2Jb\r\x07\udcff") == "a\\x1b[2Jb\\r\\x07\\udcff"
    assert printable("läuf 日本 [x]\nnext") == "läuf 日本 [x]\nnext"


def test_every_console_of_the_package_is_that_one():
    """Another console would read markup in some user's path, for whoever prints on it."""
    found = []
    for room in ROOMS.iterdir():
        for path in room.rglob("*.py") if room.is_dir() else ():
            if path.resolve() == ROOMS.parent / "run" / "console.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                makes = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Console")
                reads = isinstance(node, ast.ImportFrom) and node.module == "rich.markup"
                if makes or reads:
                    found.append(f"{path}:{node.lineno}")
    assert found == []
