"""Which release says that it runs."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from gflowvlm import version as ours
from gflowvlm.cli.main import app


@pytest.fixture
def copied(tmp_path: Path) -> ModuleType:
    """The module as it stands in an installed package: no project beside it."""
    file = tmp_path / "gflowvlm" / "version.py"
    file.parent.mkdir(parents=True)
    shutil.copy(str(ours.__file__), file)
    spec = importlib.util.spec_from_file_location("copied_version", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_says_its_release() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"gflowvlm {ours.version()}\n"


def test_a_checkout_has_its_own_release_and_no_other_projects(copied: ModuleType, tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "gflowvlm"\nversion = "7.8.9"\n')
    assert copied.version() == "7.8.9"
    project.write_text('[project]\nname = "another"\nversion = "7.8.9"\n')
    assert copied.version() != "7.8.9"


def test_without_a_project_it_is_the_installed_release_or_unknown(
    copied: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copied, "NAME", "typer")
    assert copied.version().count(".") >= 1
    monkeypatch.setattr(copied, "NAME", "gflowvlm-that-nobody-installed")
    assert copied.version() == copied.UNKNOWN
