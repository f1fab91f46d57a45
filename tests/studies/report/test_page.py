"""The page as a file: what it holds, and that nothing in a run can break out of its place."""

import base64
import gzip
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gflowvlm.cli.commands.report import run_page
from gflowvlm.cli.main import app, main
from gflowvlm.shared.config import PolicySettings, RunConfig
from gflowvlm.studies.report import trajectory_data
from gflowvlm.studies.report.curves import Curve, Panel, draw, panels
from gflowvlm.studies.report.page import embedded_json, packed_json
from tests.studies.report.played import HOSTILE, hostile, numberline_group, write_run


class Reader(HTMLParser):
    """Collects elements, their attributes and the texts of scripts, as an HTML parser sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)


def read(page: str) -> tuple[Reader, list[str], dict[str, Any]]:
    """Returns a page's elements, its pictures and its data."""
    reader = Reader()
    reader.feed(page)
    pictures, data, _ = reader.scripts
    return reader, json.loads(pictures), json.loads(gzip.decompress(base64.b64decode(data)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    groups = [numberline_group(index, seed=index, version=index) for index in range(4)]
    return write_run(tmp_path / "run", groups).root


def test_the_page_holds_curves_tables_configuration_and_trajectories(run: Path) -> None:
    reader, pictures, data = read(run_page(run, 1000, None))
    text = " ".join(reader.text)
    for part in ("var_tb", "0.875", "total_variation", "learner.learning_rate", "20 of 60", "1.5 min", "2.5 GiB"):
        assert part in text
    assert sum(tag == "figure" for tag, _ in reader.elements) == 6
    assert len(data["trajectories"]) == 20
    assert len(data["trees"]) == 4
    assert len(pictures) == len(set(pictures)) > 4
    step = data["trajectories"][0]["steps"][0]
    assert step["log_probs"] == [-0.25, -0.25, -0.5, 0.0]
    assert base64.b64decode(pictures[step["picture"]].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert step["thoughts"] == "thinking of it"
    assert data["trajectories"][4]["steps"][0]["log_probs"] == [None] * 4
    assert [token for token, _ in data["pieces"]] == [10, 11, 12, 13]


def test_nothing_is_taken_from_elsewhere(run: Path) -> None:
    reader, _, _ = read(run_page(run, 1000, None))
    for tag, attributes in reader.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, value)
    assert "url(" not in (page := run_page(run, 1000, None))
    assert "@import" not in page


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    config = RunConfig(policy=PolicySettings(model=f"/{HOSTILE}"))
    group = [hostile(trajectory) for trajectory in numberline_group(0, seed=1)]
    run = write_run(tmp_path / "run", [group], config).root
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "fatal", "reason": HOSTILE}) + "\n")
        log.write(json.dumps({"kind": "step", "step": 21, "loss": HOSTILE, "version": HOSTILE}) + "\n")
        figures = {"step": HOSTILE, "version": HOSTILE, "samples": HOSTILE, "split": HOSTILE, "success": HOSTILE}
        log.write(json.dumps({"kind": "evaluation", **figures}) + "\n")
    summary = json.loads((run / "summary.json").read_text())
    summary["report"][0] |= {"split": HOSTILE, "success": HOSTILE, "instances": HOSTILE}
    (run / "summary.json").write_text(json.dumps(summary))
    plain = write_run(tmp_path / "plain", [numberline_group(0, seed=1)]).root
    reader, _, data = read(run_page(run, 1000, None))
    expected, _, _ = read(run_page(plain, 1000, None))
    assert sum(tag == "script" for tag, _ in reader.elements) == 3
    assert {tag for tag, _ in reader.elements} <= {tag for tag, _ in expected.elements} | {"p"}
    assert not any(name.startswith("on") for _, attributes in reader.elements for name in attributes)
    assert data["trajectories"][0]["steps"][0]["response"] == HOSTILE
    assert data["instance"] == HOSTILE


def test_half_a_surrogate_pair_in_a_response_is_shown_as_any_text(tmp_path: Path) -> None:
    group = numberline_group(0, seed=1)
    response = '{"thoughts": "\\ud800 lost", "action": "+"}'
    steps = [replace(group[1].steps[0], response_text=response, action="+"), *group[1].steps[1:]]
    run = write_run(tmp_path / "run", [[replace(group[1], steps=steps)]]).root
    _, _, data = read(run_page(run, 1000, None))
    assert data["trajectories"][0]["steps"][0]["thoughts"] == "\ud800 lost"


def test_a_run_whose_start_stayed_best_has_figures_after_training(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["report"]
    summary |= {"version": 0, "report": [before, {**after, "version": 0}]}
    (run / "summary.json").write_text(json.dumps(summary))
    text = " ".join(read(run_page(run, 1000, None))[0].text)
    assert "0.875" in text
    assert "before: the base model, after: the base model too, as no adapter evaluated better" in text


@pytest.mark.parametrize(("losses", "logarithmic"), [((100.0, 1.0), True), ((0.5, -0.01), False)])
def test_a_loss_that_may_be_negative_has_an_axis_that_shows_it(losses: tuple[float, ...], logarithmic: bool) -> None:
    (panel,) = panels([{"kind": "step", "step": step, "loss": loss} for step, loss in enumerate(losses)])
    assert panel.logarithmic is logarithmic
    assert f"from {losses[0]:.3g} to {losses[1]:.3g}" in draw(panel).replace("−", "-")


@pytest.mark.parametrize(
    ("previous", "text", "expected"),
    [
        ("", "a\nb", (0, "a\nb")),
        (
            "goal\nState 0: picture\nend",
            "goal\nState 0: 4\nState 1: picture\nend",
            (5, "State 0: 4\nState 1: picture\nend"),
        ),
        ("goal\nend", "goal\nend", (5, "end")),
        ("\U0001f600\nend", "\U0001f600\nmore", (3, "more")),
        ("one line", "one line, longer", (0, "one line, longer")),
    ],
)
def test_prompts_repeat_whole_lines_of_the_one_before(previous: str, text: str, expected: tuple[int, str]) -> None:
    assert trajectory_data.new_lines(previous, text) == expected


@pytest.mark.parametrize("pack", [embedded_json, packed_json])
def test_embedded_values_can_end_no_element(pack: Any) -> None:
    packed = pack([HOSTILE, {HOSTILE: None}])
    assert re.search(r"[<>&]", packed) is None
    if pack is embedded_json:
        assert json.loads(packed) == [HOSTILE, {HOSTILE: None}]


def test_the_script_and_the_style_are_those_that_the_policy_allows(run: Path) -> None:
    page = run_page(run, 1000, None)
    reader, _, _ = read(page)
    policy = next(a["content"] for tag, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"script-src '(sha256-[^']+)'", policy)


def test_a_picture_that_is_in_many_places_is_stored_once(tmp_path: Path) -> None:
    group = numberline_group(0, seed=1)
    copies = [[replace(t, trajectory_id=f"{t.trajectory_id}-{n}") for t in group] for n in range(5)]
    once = write_run(tmp_path / "once", [group]).root
    often = write_run(tmp_path / "often", copies).root
    assert read(run_page(once, 1000, None))[1] == read(run_page(often, 1000, None))[1]


def test_pictures_beyond_their_room_are_left_out_and_it_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_data, "PICTURE_CHARS", 20_000)
    reader, pictures, data = read(run_page(run, 1000, None))
    assert 0 < sum(map(len, pictures)) <= 20_000
    assert re.search(r"\d+ pictures found no room and are left out", " ".join(reader.text))
    assert data["trajectories"][-1]["steps"][0]["picture"] is None


def test_what_is_no_picture_is_not_shown_as_one(tmp_path: Path) -> None:
    svg = [replace(t, images=[b"<svg onload='alert(1)'/>"] * len(t.images)) for t in numberline_group(0, seed=1)]
    _, pictures, data = read(run_page(write_run(tmp_path / "run", [svg]).root, 1000, None))
    assert pictures == []
    assert data["trajectories"][0]["steps"][0]["picture"] is None


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    folder.metrics.unlink()
    folder.summary.unlink()
    folder.trajectories.rmdir()
    reader, pictures, data = read(run_page(folder.root, 10, None))
    assert (pictures, data["trajectories"], data["trees"], data["instance"]) == ([], [], [], None)
    assert "no final report yet" in " ".join(reader.text)


def test_the_tree_of_the_instance_asked_for_is_opened(run: Path) -> None:
    assert read(run_page(run, 5, "numberline/id/1"))[2]["instance"] == "numberline/id/1"
    assert read(run_page(run, 1000, None))[2]["instance"] == "numberline/id/3"


def test_figures_that_are_not_finite_are_left_out_of_curves() -> None:
    rows = [{"kind": "step", "step": n, "loss": v} for n, v in enumerate((1.0, float("nan"), -2.0, None, 4.0))]
    (panel,) = panels(rows)
    assert panel.curves[0].points == [(0.0, 1.0), (2.0, -2.0), (4.0, 4.0)]
    drawn = draw(panel)
    assert re.search(r'points="[\d., -]+"', drawn)
    assert "from 1 to 4" in drawn


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-12, 1e12], [-5.0, -5.0], [1e300, 1.0]])
@pytest.mark.parametrize("logarithmic", [True, False])
def test_any_values_can_be_drawn(values: list[float], logarithmic: bool) -> None:
    points = [(float(at), value) for at, value in enumerate(values)]
    drawn = draw(Panel("p", "x", "y", [Curve("c", points, "blue")], logarithmic=logarithmic))
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert drawn.count("<text") < 30


def test_the_command_writes_one_file_and_names_it(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exception is None, result.output
    assert "report.html" in result.output
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page.html"), "--limit", "5"])
    assert len(read((tmp_path / "page.html").read_text())[2]["trajectories"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no run there"),
        (["RUN", "--instance", "numberline/id/99"], "nothing of it was played"),
        (["RUN", "--out", "no/such/folder.html"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gflowvlm", "report", *(str(run) if a == "RUN" else a for a in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_summary_is_named(content: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "summary.json").write_text(content)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert "summary.json" in str(result.exception)
