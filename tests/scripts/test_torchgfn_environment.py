"""The environment that torchgfn is compared in."""

import sys
from pathlib import Path

import pytest
import torchgfn_environment as environment


def test_an_environment_that_is_missing_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "VENV_PYTHON", tmp_path / "bin" / "python")
    assert environment.works() is None


def test_a_failed_command_names_what_failed_and_shows_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "VENV", tmp_path)
    monkeypatch.setattr(environment, "LOG", tmp_path / "set-up.log")
    command = [sys.executable, "-c", "import sys; sys.exit('no such package')"]
    with pytest.raises(environment.SetUpError, match=r"pip failed:\n  no such package"):
        environment.run_or_stop("pip", command, 60)
    assert "no such package" in (tmp_path / "set-up.log").read_text()
