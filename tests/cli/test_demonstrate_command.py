"""`gflowvlm demonstrate` and what reads its sets, on the command line."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gflowvlm.cli.main import app, main
from tests.actors.made_demonstrations import content, damage, files, make_set, stored, truncate

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None, result.output
    return result.output


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit status 2 and one line, which is returned."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gflowvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        (line,) = [line for line in error.splitlines() if line.startswith("gflowvlm:")]
        return line

    return run


def test_it_writes_a_set_that_tells_what_made_it(tmp_path: Path) -> None:
    out = tmp_path / "set"
    output = command(
        "demonstrate", "numberline", "prompt=markov", "n_max=4",
        "--out", out, "--trajectories", 5, "--seed", 2, "--noise", 0.1, "--split", "ood",
    )  # fmt: skip
    assert f"5 trajectories of numberline, split ood, in {out}" in output.replace("\n", " ")
    manifest = json.loads((out / "demonstrations.json").read_text())
    task = manifest["request"].pop("task")
    assert (task["name"], task["prompt"], task["n_max"]) == ("numberline", "markov", 4)
    assert manifest["request"] == {
        "split": "ood", "trajectories": 5, "seed": 2, "noise": 0.1, "failures": False, "model": "numberline-tiny",
    }  # fmt: skip
    assert 0 < manifest["figures"]["success"] <= 1
    assert manifest["figures"]["played"] >= 5
    before = content(out)
    command(
        "demonstrate", "numberline", "prompt=markov", "n_max=4",
        "--out", out, "--trajectories", 5, "--seed", 2, "--noise", 0.1, "--split", "ood",
    )  # fmt: skip
    assert content(out) == before


def test_replay_lists_a_set(tmp_path: Path) -> None:
    made = make_set(tmp_path, "blackjack")
    output = command("replay", tmp_path, "--success", "--expert", "--limit", 4)
    assert "4 of 6 matching trajectories" in output
    assert f"id {made.request.first_instance + made.figures.played - 1}" in output
    assert "by the expert" in command("replay", tmp_path, "--show", "--limit", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chess"], "task 'chess': there is no such task"),
        (["numberline", "n_max=0"], "n_max = 0"),
        (["numberline", "nothing=1"], "nothing"),
        (["numberline", "--split", "test"], "--split test"),
        (["numberline", "--noise", "2"], "--noise 2.0"),
        (["numberline", "--trajectories", "0"], "--trajectories 0"),
        (["numberline", "--seed", "2048"], "--seed 2048"),
        (["numberline", "--model", "./none"], "/none': no such directory"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    arguments: list[str], message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert message in refused("demonstrate", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert "is not empty" in refused("demonstrate", "numberline", "--out", tmp_path / "full")
    assert "cannot be written" in refused("demonstrate", "numberline", "--out", "/proc/nowhere")


def _other_schema(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


@pytest.mark.parametrize("spoil", [truncate, damage, _other_schema])
def test_a_damaged_set_is_one_line_for_who_learns_from_it(
    spoil: Callable[[Path], None], tmp_path: Path, refused: Callable[..., str]
) -> None:
    made = make_set(tmp_path / "set")
    spoil(files(made.folder)[0])
    assert "00000000.parquet" in refused("sft", "--demonstrations", made.folder, "--out", tmp_path / "model")
    if spoil is not damage:
        run = ("--run", tmp_path / "run", f"rollout.demonstrations={made.folder}")
        assert "00000000.parquet" in refused("train", *run)
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


def test_training_refuses_a_set_of_another_task(tmp_path: Path, refused: Callable[..., str]) -> None:
    made = make_set(tmp_path / "set", "blackjack", trajectories=1)
    line = refused("train", "--run", tmp_path / "run", f"rollout.demonstrations={made.folder}")
    assert "its demonstrations are of task 'blackjack', not of 'numberline'" in line
    assert not (tmp_path / "run").exists()
    assert "/nowhere': no such directory; `gflowvlm demonstrate" in refused("train", "rollout.demonstrations=nowhere")


@pytest.mark.slow
def test_ctrl_c_leaves_a_set_that_the_same_command_goes_on_with(tmp_path: Path) -> None:
    out = tmp_path / "set"
    command_line = ["demonstrate", "numberline", "--out", str(out), "--trajectories", "200000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gflowvlm.cli.main", *command_line], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while len(files(out)) < 2:
            assert time.monotonic() < deadline, "no two files were written within 120 s"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"the same command goes on" in said
    assert json.loads((out / "demonstrations.json").read_text())["figures"] is None
    assert len(stored(out)) % 64 == 0
