"""What `gflowvlm train` says at the end of a run."""

import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from gflowvlm.cli.commands.train import show_report
from gflowvlm.run.folder import RunFolder

WIDTH = 80
FIGURES = (
    "success",
    "success_greedy",
    "success_bound",
    "div_at_n",
    "malformed_rate",
    "inadmissible_rate",
    "cut_rate",
    "mean_response_tokens",
    "total_variation",
    "total_variation_floor",
)


def said(folder: Path, versions: tuple[int, int]) -> str:
    out = io.StringIO()
    report = [
        {"split": split, "version": version, **dict.fromkeys(FIGURES, 0.5)}
        for split in ("id", "ood")
        for version in versions
    ]
    console = Console(file=out, width=WIDTH, markup=False, highlight=False)
    show_report(console, RunFolder(folder), "numberline", report, 90.0)
    return out.getvalue()


def test_the_table_of_before_and_after_has_a_row_for_every_figure(tmp_path):
    text = said(tmp_path / "run", (0, 60))
    assert all(re.search(rf"^│ {figure} +│ 0.500 ", text, re.MULTILINE) for figure in FIGURES)


def test_what_to_type_next_fits_80_columns_for_a_run_of_the_default_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = said(tmp_path / "runs" / "numberline-tiny-20260131-235959", (0, 60))
    following = text.partition("what next:\n")[2].splitlines()
    commands = [line.strip() for line in following if line.strip().startswith(("gflowvlm", "tensorboard"))]
    assert [command.split()[:2] for command in commands[:4]] == [
        ["gflowvlm", "play"],
        ["gflowvlm", "report"],
        ["gflowvlm", "replay"],
        ["gflowvlm", "eval"],
    ]
    assert max(map(len, following)) <= WIDTH


def test_what_to_type_next_is_what_a_shell_takes_for_a_run_with_spaces_and_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = said(tmp_path / "my run [1]", (0, 60))
    (command,) = re.findall(r"^ +(gflowvlm report .*)$", text, re.MULTILINE)
    assert shlex.split(command) == ["gflowvlm", "report", "my run [1]"]
    shell = subprocess.run(["sh", "-c", command.replace("gflowvlm report", "echo")], capture_output=True, text=True)
    assert shell.stdout == "my run [1]\n"


@pytest.mark.parametrize(("versions", "says"), [((0, 0), True), ((0, 60), False)])
def test_a_run_whose_adapters_were_no_better_says_so(versions, says, tmp_path):
    text = said(tmp_path / "run", versions)
    assert ("no adapter evaluated better than the base model" in text) is says
    assert ("--version N" in text) is says
