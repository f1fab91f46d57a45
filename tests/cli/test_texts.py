"""Names and paths of the user's, whatever they hold, are printed as they are, in one line, and break nothing."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gflowvlm.cli.main import app
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.shell import quoted

ROOT = Path(__file__).parents[2]
NAMES = ["lr[/1e-3]", "try[lr=1e-3]", "two words", "läuf 日本", "it's $HOME", ":smile:"]


def gflowvlm(*arguments, cwd, **variables):
    return subprocess.run(
        [sys.executable, "-P", "-m", "gflowvlm", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_argument_is_quoted_only_where_a_shell_needs_it():
    assert quoted(Path("runs/first-1.0")) == "runs/first-1.0"
    for name in NAMES:
        assert shlex.split(f"gflowvlm eval {quoted(name)}") == ["gflowvlm", "eval", name]


@pytest.mark.parametrize("name", ["try[lr=1e-3] läuf", "it's [/$HOME] :smile:"])
def test_an_error_names_a_folder_as_it_is_and_the_command_it_gives_can_be_pasted(name, tmp_path):
    new_run(RunConfig(), tmp_path / name)
    result = gflowvlm("train", "--run", name, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"gflowvlm: {name}: holds a run already")
    assert shlex.split(line.split("`")[1]) == ["gflowvlm", "train", "--resume", name]


def test_a_name_that_the_terminal_has_no_letters_for_is_escaped(tmp_path):
    result = gflowvlm("eval", "läuf\x1b[2J\nb", cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "l\\xe4uf\\x1b[2J\\nb: no run there" in line


def test_a_path_that_is_no_text_is_one_line(tmp_path):
    result = gflowvlm("eval", os.fsdecode(b"\xff"), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "\\udcff: no run there" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "run", "--json", "none/x.json"),
        ("play", "numberline", "--player", "expert", "--json", "none/x.json"),
        ("replay", "run", "--json", "none/x.json"),
        ("bench", "--parts", "environment", "--json", "none/x.json"),
        ("doctor", "--json", "none/x.json"),
        ("report", "run", "--out", "none/x.html"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_the_work(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_run(RunConfig(), tmp_path / "run")
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    said = f"{' '.join(arguments[-2:])}: cannot be written (No such file or directory)"
    assert str(result.exception).startswith(said)
    assert result.output == ""


def test_a_file_that_is_there_is_not_touched_before_there_is_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("before")
    assert CliRunner().invoke(app, ["eval", "none", "--json", "x.json"]).exception is not None
    assert Path("x.json").read_text() == "before"
    result = CliRunner().invoke(app, ["play", "numberline", "--player", "expert", "--json", "x.json"])
    assert result.exit_code == 0, result.output
    assert json.loads(Path("x.json").read_text())[0]["success"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_remarks_of_libraries_do_not_reach_the_terminal(tmp_path):
    remarks = (
        "import logging, warnings; import torch; "
        "logging.getLogger('torch._library.triton').warning('Triton not available'); "
        "warnings.warn_explicit('old', FutureWarning, 'f.py', 1, module='vllm.triton_utils.dispatcher')"
    )
    quiet = ("TORCH_LOGS", "TORCH_CPP_LOG_LEVEL", "TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}

    def said(code: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode == 0, result.stderr
        return result.stderr

    loud = said(remarks)
    assert "Triton not available" in loud
    assert "FutureWarning: old" in loud
    assert said(f"from gflowvlm.cli.main import quiet_libraries; quiet_libraries(); {remarks}") == ""
