"""`gflowvlm prove`: what it writes, that it goes on, and that it says what is wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gflowvlm.cli.commands import presets, prove
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.proving.experiments import EXPERIMENTS, Case
from gflowvlm.studies.proving.runs import (
    CELLS,
    CLOSE,
    CURVES,
    RAW,
    TABLE,
    Cell,
    Finished,
    ProvingFolder,
    markdown_table,
)
from gflowvlm.studies.proving.training import Measured, Training

ROOT = Path(__file__).parents[2]
BRIEF = Case("losses", "db", "grid-7x7", Training("db", trajectories=64, evaluations=2, hidden=8))


def application() -> typer.Typer:
    app = typer.Typer()
    prove.register(app)
    presets.register(app)
    return app


def curve(*distances, modes=4):
    return tuple(
        Measured(100 * i, distance, distance / 10, modes, 0.5, float(i)) for i, distance in enumerate(distances)
    )


def test_finished_cells_are_kept_and_not_trained_again(tmp_path):
    folder = ProvingFolder(tmp_path)
    cells = [Cell(BRIEF, seed) for seed in (0, 1)]
    assert [len(list(folder.train(cell))) for cell in cells] == [3, 3]
    again = ProvingFolder(tmp_path)
    assert again.finished == folder.finished
    assert [again.finished[cell.key].last.trajectories for cell in cells] == [64, 64]
    other = replace(BRIEF, training=replace(BRIEF.training, learning_rate=0.5))
    assert Cell(other, 0).key not in again.finished
    assert Cell(replace(BRIEF, experiment="lambda", label="another name"), 0).key in again.finished


def test_a_line_that_was_cut_off_is_a_cell_to_train_again(tmp_path):
    folder = ProvingFolder(tmp_path)
    for seed in (0, 1):
        list(folder.train(Cell(BRIEF, seed)))
    path = tmp_path / CELLS
    path.write_bytes(path.read_bytes()[:-20])
    assert set(ProvingFolder(tmp_path).finished) == {Cell(BRIEF, 0).key}


def test_a_training_that_was_left_is_not_a_finished_cell(tmp_path):
    training = ProvingFolder(tmp_path).train(Cell(BRIEF, 0))
    next(training)
    training.close()
    assert ProvingFolder(tmp_path).finished == {}


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / CELLS).write_text(json.dumps({"kind": "cell", "key": "x"}) + "\n")
    with pytest.raises(UserError, match=CELLS):
        ProvingFolder(tmp_path)


def test_the_table_says_when_the_threshold_was_reached_and_by_how_many(tmp_path):
    assert CLOSE == 0.05
    tb = replace(BRIEF, label="tb")
    done = [
        (Cell(BRIEF, 0), Finished(curve(0.6, 0.05, 0.01), 4)),
        (Cell(BRIEF, 1), Finished(curve(0.6, 0.2, 0.03), 4)),
        (Cell(tb, 0), Finished(curve(0.6, 0.2, 0.1, modes=3), 4)),
        (Cell(tb, 1), Finished(curve(0.6, 0.2, 0.04, modes=4), 4)),
    ]
    title, _, _, _, db_line, tb_line, *_ = markdown_table(done).splitlines()
    assert title == f"## losses: {EXPERIMENTS['losses'].question}"
    assert db_line == (
        "| db | 2 | 150 ± 71 | 1.50 ± 0.71 | 200 | 0.0200 ± 0.0141 | 0.00200 ± 0.00141 | 4.0 ± 0.0 of 4 | 2.00 ± 0.00 |"
    )
    assert tb_line.startswith("| tb | 2 | 200 (1 of 2 seeds) | 2.00 | 200 | 0.0700")
    assert "3.5 ± 0.7 of 4" in tb_line


def test_the_command_writes_table_curves_and_raw_figures_and_goes_on(tmp_path, monkeypatch):
    experiment = replace(
        EXPERIMENTS["losses"], cases=(BRIEF, replace(BRIEF, label="tb", training=Training("tb", 160, hidden=8)))
    )
    monkeypatch.setitem(EXPERIMENTS, "losses", experiment)
    command = ["prove", "losses", "--quick", "--seeds", "2", "--out", str(tmp_path / "p")]
    first = CliRunner().invoke(application(), command)
    assert first.exit_code == 0, first.output
    assert first.output.count("total variation 0.") == 4
    rows = list(csv.DictReader((tmp_path / "p" / RAW).open()))
    assert {(row["experiment"], row["case"], row["seed"]) for row in rows} == {
        ("losses", case, seed) for case in ("db", "tb") for seed in "01"
    }
    assert max(int(row["trajectories"]) for row in rows) == 160
    assert (tmp_path / "p" / TABLE).read_text().count("\n| ") == 3
    assert (tmp_path / "p" / CURVES).read_bytes().startswith(b"\x89PNG")
    second = CliRunner().invoke(application(), command)
    assert second.exit_code == 0
    assert "total variation 0." not in second.output
    assert len((tmp_path / "p" / CELLS).read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["lamda"], ["'lamda'", "did you mean 'lambda'"]),
        (["chess"], ["'chess'", "forward-looking"]),
        (["losses", "--out", "file/p"], ["--out file/p"]),
    ],
)
def test_wrong_arguments_are_errors_for_the_user(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(application(), ["prove", *arguments])
    assert isinstance(result.exception, UserError)
    for part in parts:
        assert part in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on_and_keeps_its_cells(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-m", "gflowvlm.cli.main", "prove", "losses", "--out", "p"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "p" / CELLS).exists():
            assert child.poll() is None, "ended before its first cell"
            assert time.monotonic() < deadline, "no cell after 240 s"
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "interrupted" in output
    assert len(ProvingFolder(tmp_path / "p").finished) >= 1
    assert (tmp_path / "p" / TABLE).exists()
