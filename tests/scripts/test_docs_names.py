"""Every file and module that documentation and comments name is there."""

import subprocess
from pathlib import Path

import pytest
from docs_site.names import page_problems, source_problems
from docs_site.references import DOCS

ROOT = DOCS.parent


def test_every_path_and_module_that_the_documentation_names_exists() -> None:
    assert page_problems([ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ROOT) == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_every_file_that_a_comment_names_exists() -> None:
    kinds = ("*.py", "*.yaml", "*Dockerfile", "Makefile", "*.toml", "*.js", "*.html", ":!tests")
    listed = subprocess.run(["git", "ls-files", *kinds], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert source_problems([ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()], ROOT) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with one room, one module of it, a function and a class in that."""
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").touch()
    (tmp_path / "envs" / "base.py").write_text("def made():\n    return 1\n\n\nclass Made:\n    def again(self): ...\n")
    (tmp_path / "gflowvlm").mkdir()
    (tmp_path / "gflowvlm" / "__init__.py").write_text(
        '__all__ = ["train"]\nfrom gflowvlm.envs.base import Made as Made\n'
    )
    (tmp_path / "gflowvlm" / "envs").symlink_to("../envs")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`envs/gone.py`", "envs/gone.py"),
        ("see `envs/gone/`.", "envs/gone/"),
        ("`envs/NAME/x.py`", "envs/NAME/x.py"),
        ("```\npython envs/gone.py --all\n```", "envs/gone.py"),
        ("`gflowvlm.envs.gone`", "gflowvlm.envs.gone"),
        ("`gflowvlm.envs.base.gone`", "gflowvlm.envs.base.gone"),
        ("`gflowvlm.envs.base:gone`", "gflowvlm.envs.base.gone"),
        ("`gflowvlm.gone`", "gflowvlm.gone"),
        ("`gflowvlm.Made.gone`", "gflowvlm.Made.gone"),
        ("```python\nfrom gflowvlm.envs.base import made, gone\n```", "gflowvlm.envs.base.gone"),
        ("`envs/base.py`, `envs/NAME.py`, `envs`, `runs/envs/gone.py`, envs/gone.py, `/envs/gone`", None),
        ("`gflowvlm.envs.base:made` `gflowvlm.train` `gflowvlm.Made.again`", None),
        ("`gflowvlm.io/role` `gflowvlm-x.gflowvlm.svc`", None),
    ],
)
def test_a_name_is_judged_by_what_the_tree_has(tree: Path, text: str, missing: str | None) -> None:
    (tree / "page.md").write_text(text)
    wanted = [] if missing is None else [f"page.md:1: there is no {missing}"]
    assert page_problems([tree / "page.md"], tree) == wanted


def test_a_comment_is_judged_by_the_files_it_names(tree: Path) -> None:
    (tree / "made.py").write_text("# as in envs/base.py\n# and in envs/gone.py: either envs/or nothing\n")
    assert source_problems([tree / "made.py"], tree) == ["made.py:2: there is no envs/gone.py"]
