"""The arrows of the architecture: which folder may import which, wherever in a file the import stands."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gflowvlm"
MAY_IMPORT = {
    "shared": set(),
    "envs": {"shared"},
    "run": {"shared"},
    "actors": {"shared", "envs", "run"},
    "learner": {"shared"},
    "evaluation": {"shared", "envs", "run", "actors", "learner"},
    "warm_starts": {"shared", "envs", "run", "actors", "learner"},
    "cluster": {"shared", "envs", "run", "actors", "learner", "evaluation"},
    "studies": {"shared", "envs", "run", "actors", "learner", "evaluation", "warm_starts", "cluster"},
    "api": {"shared", "envs", "run", "actors", "learner", "evaluation", "cluster", "studies"},
    "cli": {"shared", "envs", "run", "actors", "learner", "evaluation", "warm_starts", "cluster", "studies", "api"},
}
"""The rooms, from the bottom up: what each may import of ours, besides itself."""
OURS = tuple(MAY_IMPORT)
# What a folder must be usable without.
MUST_NOT_IMPORT = {
    "shared": {"ray", "torch", "vllm"},
    "envs": {"ray", "torch", "transformers", "peft", "vllm"},
    "run": {"ray", "torch", "transformers", "peft", "vllm"},
    "learner": {"ray", "vllm"},
    "evaluation": {"ray"},
    "warm_starts": {"ray"},
}
NOT_INSTALLED = {"scripts", "tests", *OURS}
"""Names that exist in a checkout's root only: with the wheel they are somebody else's, or nobody's."""


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of every import, function-level and importlib ones included.

    Args:
        source: Python source text.
        package: Dotted package the file lies in; relative imports are resolved against it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                assert node.module is not None
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"
            else:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}" if base else "(outside the package)"
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            first = node.args[0]
            if called in ("importlib.import_module", "import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def violations(folder: str, source: str, package: str, where: str) -> list[str]:
    """Lists the imports in a source text that its folder must not have."""
    found = []
    for line, name in imported_names(source, package):
        top, _, rest = name.partition(".")
        room = rest.split(".")[0]
        if top == PACKAGE and room not in ("", folder) and room not in MAY_IMPORT[folder]:
            found.append(f"{where}:{line} imports {PACKAGE}.{room}")
        elif top in MUST_NOT_IMPORT.get(folder, set()) | NOT_INSTALLED:
            found.append(f"{where}:{line} imports {top}")
    return found


def test_the_package_links_every_room_and_nothing_else() -> None:
    linked = {path.name: path.resolve() for path in (ROOT / PACKAGE).iterdir() if path.is_symlink()}
    assert linked == {room: ROOT / room for room in OURS}


def table(page: str, heading: str) -> list[list[str]]:
    """Rows of the first table under a heading of a page, each cell as the names in code that it holds."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    rows = text[text.index("|---") :].partition("\n\n")[0].splitlines()[1:]
    return [[" ".join(re.findall(r"`(\w+)/?`", cell)) for cell in row.strip("|").split("|")] for row in rows]


def test_pages_have_every_folder_and_say_what_it_may_import() -> None:
    assert [row[0] for row in table("README.md", "How the code is laid out")] == list(OURS)
    said = {row[0]: set(row[2].split()) for row in table("docs/contributing.md", "Folders and arrows")}
    assert said == MAY_IMPORT


@pytest.mark.parametrize("folder", OURS)
def test_folder_imports_only_what_the_architecture_allows(folder: str) -> None:
    found = []
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no sources in {folder}/"
    for file in files:
        relative = file.relative_to(ROOT)
        package = ".".join((PACKAGE, *relative.parent.parts))
        found += violations(folder, file.read_text(encoding="utf-8"), package, str(relative))
    assert found == []


def imports_of_modules() -> dict[str, set[str]]:
    """What each of our modules imports of the others, function-level imports included."""
    files = {file: file.relative_to(ROOT / PACKAGE) for file in (ROOT / PACKAGE).glob("*.py")}
    files |= {file: file.relative_to(ROOT) for room in OURS for file in (ROOT / room).rglob("*.py")}
    names = {
        file: ".".join((PACKAGE, *path.with_suffix("").parts)).removesuffix(".__init__") for file, path in files.items()
    }
    found: dict[str, set[str]] = {}
    for file, name in names.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for _, imported in imported_names(file.read_text(encoding="utf-8"), package):
            while imported and imported not in names.values():
                imported = imported.rpartition(".")[0]
            found[name] |= {imported} - {"", name}
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    order = list(TopologicalSorter(imports_of_modules()).static_order())
    assert order.index(f"{PACKAGE}.shared.config") < order.index(f"{PACKAGE}.cli.main")


@pytest.mark.parametrize(
    ("folder", "source", "name"),
    [
        ("learner", "def f():\n    import ray.train as rt\n", "ray"),
        ("learner", "from gflowvlm.actors.replay import Buffer\n", "gflowvlm.actors"),
        ("actors", "if True:\n    from gflowvlm import learner\n", "gflowvlm.learner"),
        ("envs", "import importlib\nimportlib.import_module('torch.nn')\n", "torch"),
        ("shared", "from gflowvlm.envs import numberline\n", "gflowvlm.envs"),
        ("cluster", "from gflowvlm.studies.report import page\n", "gflowvlm.studies"),
        ("evaluation", "from ..cluster import driver\n", "gflowvlm.cluster"),
        ("cluster", "from shared.config import RunConfig\n", "shared"),
        ("envs", "class A:\n    def f(self):\n        from ray import serve\n", "ray"),
    ],
)
def test_forbidden_import_is_found_wherever_it_stands(folder: str, source: str, name: str) -> None:
    assert [text.rsplit(" ", 1)[1] for text in violations(folder, source, f"{PACKAGE}.{folder}", "x.py")] == [name]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("learner", "from gflowvlm.shared.trajectory import Trajectory\nfrom .losses import var_tb\nimport torch\n"),
        ("envs", "from . import numberline\nimport numpy\n"),
        ("cluster", "import ray\nfrom gflowvlm.learner import losses\nfrom gflowvlm.actors import replay\n"),
    ],
)
def test_allowed_import_is_not_reported(folder: str, source: str) -> None:
    assert violations(folder, source, f"{PACKAGE}.{folder}", "x.py") == []
