"""`gflowvlm replay`: filters, what is shown, and errors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.cli.commands.replay import Filters, find_trajectories
from gflowvlm.cli.main import app, main
from gflowvlm.shared.config import BufferSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import Trajectory, to_record_batch
from tests.actors.made_trajectories import make_group, make_trajectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Groups 0..4, made by version 0..4, of two; solved from 3 on; an expert in 2; out of distribution in 4."""
    buffer = ReplayBuffer(BufferSettings(), 0, tmp_path / "trajectories")
    for index in range(5):
        made = make_group(
            index, expert=index == 2, version=index, success=index > 2, split="ood" if index == 4 else "id"
        )
        buffer.append(to_record_batch(made))
    return tmp_path


def found(run: Path, limit: int | None = None, **filters: object) -> list[str]:
    trajectories, passed = find_trajectories(run, Filters(**filters), limit)  # type: ignore[arg-type]
    assert len(trajectories) == (passed if limit is None else min(passed, limit))
    return [f"{int(t.group_id[1:9])}/{t.trajectory_id.rsplit('/')[1]}" for t in trajectories]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1", "2/expert", "3/0", "3/1", "4/0", "4/1"]),
        ({"success": True}, ["2/expert", "3/0", "3/1", "4/0", "4/1"]),
        ({"success": False}, ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]),
        ({"expert": True}, ["2/expert"]),
        ({"success": True, "expert": False, "split": "id"}, ["3/0", "3/1"]),
        ({"split": "ood"}, ["4/0", "4/1"]),
        ({"task": "numberline", "version": 1}, ["1/0", "1/1"]),
        ({"min_version": 3}, ["3/0", "3/1", "4/0", "4/1"]),
        ({"group": "2"}, ["2/0", "2/1", "2/expert"]),
        ({"group": "g00000003-0a"}, ["3/0", "3/1"]),
        ({"group": "77"}, []),
        ({"limit": 3}, ["3/1", "4/0", "4/1"]),
        ({"limit": 1, "success": False}, ["2/1"]),
    ],
)
def test_filters_leave_what_was_asked_for(filters: dict[str, object], expected: list[str], run: Path) -> None:
    assert found(run, **filters) == expected  # type: ignore[arg-type]


def test_a_version_is_found_among_those_of_all_steps(tmp_path: Path) -> None:
    mixed = make_trajectory("t/0", "g00000000-0a", version=4, steps=2)
    mixed = replace(mixed, steps=[replace(mixed.steps[0], policy_version=3), mixed.steps[1]])
    ReplayBuffer(BufferSettings(), 0, tmp_path / "trajectories").append(to_record_batch([mixed]))
    assert found(tmp_path, version=3) == found(tmp_path, version=4) == found(tmp_path, min_version=3) == ["0/0"]
    assert found(tmp_path, version=2) == found(tmp_path, min_version=4) == []


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
        (["RUN", "--split", "test"], "--split 'test': there is no such split; use one of: id, ood"),
        (["RUN", "--task", "chess"], "--task 'chess': there is no such task"),
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


@pytest.mark.parametrize("keep", [0, 4, 300])
def test_a_damaged_file_is_named(keep: int, run: Path) -> None:
    path = run / "trajectories" / "00000003.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00000003\.parquet: not a readable trajectory file"):
        found(run)


def test_damage_inside_a_file_is_an_error_of_one_line(run: Path) -> None:
    path = run / "trajectories" / "00000003.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        found(run)


def test_files_of_another_schema_are_named(run: Path) -> None:

    pq.write_table(pa.table({"a": [1]}), run / "trajectories" / "00000009.parquet")
    with pytest.raises(UserError, match=r"00000009\.parquet: not in the trajectory schema"):
        found(run)


def test_a_run_without_any_trajectory_yet_has_none(tmp_path: Path) -> None:
    (tmp_path / "trajectories").mkdir()
    assert found(tmp_path) == []
