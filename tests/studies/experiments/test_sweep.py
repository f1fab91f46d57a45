"""The curves of several runs."""

import pytest

from gflowvlm.run.log import append_row
from gflowvlm.run.preset_library import load_preset
from gflowvlm.studies.experiments import sweep
from gflowvlm.studies.experiments.results import CURVES
from tests.studies.experiments.small_experiment import report, select


@pytest.mark.parametrize("distance", [0.3, None])
def test_curves_have_no_panel_for_what_no_evaluation_has(distance, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(sweep, "save_picture", lambda figure, _: titles.extend(a.get_title() for a in figure.axes))
    (trial,) = select(tmp_path, seeds=1, only=["db"]).trials().chosen
    trial.run.prepare()
    for step in (0, 10):
        row = {"step": step, **report(step, "id", 0.5), "total_variation": distance}
        append_row(trial.run.folder.metrics, "evaluation", row)
    sweep.draw_curves([trial.run], tmp_path / CURVES)
    assert len(titles) == (2 if distance is None else 3)
    assert ("total variation to R/Z" in titles) == (distance is not None)


def test_each_task_has_its_own_row_of_curves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep, "save_picture", lambda figure, _: drawn.extend(figure.axes))
    (trial,) = select(tmp_path, seeds=1, only=["db"]).trials().chosen
    blackjack = load_preset("blackjack-tiny")
    runs = [trial.run, sweep.SweepRun.in_folder(tmp_path, "cards", blackjack)]
    for run in runs:
        run.prepare()
        append_row(run.folder.metrics, "evaluation", {"step": 0, **report(0, "id", 0.5)})
    sweep.draw_curves(runs, tmp_path / CURVES)
    labels = [[line.get_label() for line in axes.lines] for axes in drawn]
    assert labels == [["db (1 seed)"]] * 3 + [["cards (1 seed)"]] * 3


def test_curves_leave_out_the_diversity_of_an_evaluation_that_solved_nothing(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep, "save_picture", lambda figure, _: drawn.extend(figure.axes))
    (trial,) = select(tmp_path, seeds=1, only=["db"]).trials().chosen
    trial.run.prepare()
    for step, success in ((0, 0.0), (10, 0.5), (20, 0.5)):
        append_row(trial.run.folder.metrics, "evaluation", {"step": step, **report(step, "id", success)})
    sweep.draw_curves([trial.run], tmp_path / CURVES)
    points = {axes.get_title(): list(axes.lines[0].get_xdata()) for axes in drawn}
    assert points.pop("Div@N") == [10, 20]
    assert all(found == [0, 10, 20] for found in points.values())
