"""The arrows of the architecture: which folder may import which, wherever in a file the import stands."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("shared", "envs", "actors", "learner", "cluster")
MAY_IMPORT = {
    "shared": {"shared"},
    "envs": {"shared", "envs"},
    "actors": {"shared", "envs", "actors"},
    "learner": {"shared", "learner"},
    "cluster": set(OURS),
}
# What a folder must be usable without.
MUST_NOT_IMPORT = {
    "shared": {"ray", "vllm", "cluster", "scripts", "tests"},
    "envs": {"ray", "torch", "transformers", "peft", "vllm", "scripts", "tests"},
    "actors": {"scripts", "tests"},
    "learner": {"ray", "vllm", "scripts", "tests"},
    "cluster": {"scripts", "tests"},
}


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, top-level package) of every import, function-level and importlib ones included.

    Args:
        source: Python source text.
        package: Dotted package the file lies in; relative imports are resolved against it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                assert node.module is not None
                yield node.lineno, node.module.split(".")[0]
            else:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                yield node.lineno, parents[0] if parents else "(outside the package)"
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            first = node.args[0]
            if called in ("importlib.import_module", "import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value).split(".")[0]


def violations(folder: str, source: str, package: str, where: str) -> list[str]:
    """Lists the imports in a source text that its folder must not have."""
    found = []
    for line, name in imported_names(source, package):
        refused = name in OURS and name not in MAY_IMPORT[folder]
        if refused or name in MUST_NOT_IMPORT[folder]:
            found.append(f"{where}:{line} imports {name}")
    return found


@pytest.mark.parametrize("folder", OURS)
def test_folder_imports_only_what_the_architecture_allows(folder: str) -> None:
    found = []
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no sources in {folder}/"
    for file in files:
        relative = file.relative_to(ROOT)
        package = ".".join(relative.parent.parts)
        found += violations(folder, file.read_text(encoding="utf-8"), package, str(relative))
    assert found == []


@pytest.mark.parametrize(
    ("folder", "source", "name"),
    [
        ("learner", "def f():\n    import ray.train as rt\n", "ray"),
        ("learner", "from actors.replay import Buffer\n", "actors"),
        ("actors", "if True:\n    from learner import losses\n", "learner"),
        ("envs", "import importlib\nimportlib.import_module('torch.nn')\n", "torch"),
        ("shared", "from envs import numberline\n", "envs"),
        ("envs", "class A:\n    def f(self):\n        from ray import serve\n", "ray"),
    ],
)
def test_forbidden_import_is_found_wherever_it_stands(folder: str, source: str, name: str) -> None:
    assert [text.rsplit(" ", 1)[1] for text in violations(folder, source, folder, "x.py")] == [name]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("learner", "from shared.trajectory import Trajectory\nfrom .losses import var_tb\nimport torch\n"),
        ("envs", "from . import numberline\nimport numpy\n"),
        ("cluster", "import ray\nfrom learner import losses\nfrom actors import replay\n"),
    ],
)
def test_allowed_import_is_not_reported(folder: str, source: str) -> None:
    assert violations(folder, source, folder, "x.py") == []
