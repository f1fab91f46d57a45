"""`gflowvlm replay`: filters, what is shown, and errors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.cli.main import app, main
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.trajectory import Trajectory, to_record_batch
from tests.actors.made_trajectories import make_trajectory, write_groups


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_groups(tmp_path)


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)])
    assert result.exception is None, result.output
    return result.output


def test_the_table_names_trajectories_and_counts_them(run: Path) -> None:
    output = command(run, "--failed", "--limit", 2)
    assert "g00000002-0a/0" in output
    assert "g00000001-0a/1" not in output
    assert "2 of 6 matching trajectories" in output
    assert "no trajectory matches" in command(run, "--group", "77")


def test_show_prints_prompt_response_action_and_rewards(run: Path) -> None:
    output = command(run, "--show", "--expert")
    for text in ("prompt 0", "prompt 1", '{"thoughts": "t", "action": "+"}', "log-reward 4.000", "by the expert"):
        assert text in output


def test_json_holds_all_that_match(run: Path) -> None:
    file = run / "out.json"
    command(run, "--success", "--json", file)
    content = json.loads(file.read_text())
    assert content["matching"] == len(content["trajectories"]) == 5
    expert = content["trajectories"][0]
    assert expert["expert"] is True
    assert expert["images"] == 1
    assert expert["steps"][0]["sampler_log_probs"] == [None, None, None]
    command(run, "--success", "--limit", 2, "--json", file)
    assert len(json.loads(file.read_text())["trajectories"]) == 2


def hostile(trajectory: Trajectory) -> Trajectory:
    text = "[red]markup[/red] \x1b[2Jescape \x07 [/nothing] 左"
    step = replace(trajectory.steps[0], response_text=text, prompt=text, action=text)
    return replace(trajectory, steps=[step, trajectory.steps[1]], outcome=text)


def test_model_output_controls_neither_markup_nor_terminal(tmp_path: Path) -> None:
    made = hostile(make_trajectory("t/0", "g00000000-0a"))
    ReplayBuffer(BufferSettings(), 0, tmp_path / "trajectories").append(to_record_batch([made]))
    for arguments in ([], ["--show"]):
        output = command(tmp_path, *arguments)
        assert "\x1b" not in output
        assert "\x07" not in output
    assert "[red]markup[/red] \\x1b[2Jescape \\x07 [/nothing] 左" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "there is no such folder"),
        (["."], "holds no trajectories"),
        (["RUN", "--split", "test"], "split 'test': there is no such split; use one of: id, ood"),
        (["RUN", "--task", "chess"], "task 'chess': there is no such task"),
        (["RUN", "--json", "no/such/folder.json"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "empty").mkdir()
    monkeypatch.chdir(run / "empty")
    monkeypatch.setattr(sys, "argv", ["gflowvlm", "replay", *(str(run) if a == "RUN" else a for a in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--version", "-1"], ["--limit", "0"], ["--version", "new"], ["--nonsense"]])
def test_bad_options_exit_with_code_2(arguments: list[str], run: Path) -> None:
    assert CliRunner().invoke(app, ["replay", str(run), *arguments]).exit_code == 2
