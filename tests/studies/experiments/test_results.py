"""The table, the figures and the pictures of finished trials."""

import csv
import json

from gflowvlm.studies.experiments.description import Column, Experiment, Line, Variant
from gflowvlm.studies.experiments.results import AT_END, AT_START, CURVES, PICTURE, RAW, TABLE, figures, write_results
from tests.studies.experiments.small_experiment import SMALL, finish, select


def test_the_table_has_the_papers_figures_beside_ours(tmp_path):
    trials = select(tmp_path).trials().chosen
    for trial, after in zip(trials, (0.8, 0.5, 0.9, 0.6), strict=True):
        finish(trial, after)
    text = write_results(SMALL, list(select(tmp_path).finished()), tmp_path)
    assert (tmp_path / TABLE).read_text() == text
    assert "Table 0" in text
    assert "numberline-tiny" in text
    assert "LLaVA-1.6-Mistral-7B" in text
    assert "* A note." in text
    head, _, subtb, db = [line for line in text.splitlines() if line.startswith("|")]
    heads, cells = ([c.strip() for c in line.strip("|").split("|")] for line in (head, subtb))
    found = dict(zip(heads, cells, strict=True))
    assert found["success"] == "85.0 ± 7.1"
    assert cells[heads.index("success") + 1] == "60.0"
    assert found["start"] == "40.0 ± 0.0"
    assert found["hot"] == "1.85 ± 0.07"
    assert found["environment steps"] == "300"
    assert found["environment steps to 75 %"] == "300"
    assert found["minutes"] == "2.0 ± 0.0"
    assert "| 55.0 ± 7.1 | - |" in db
    rows = list(csv.DictReader((tmp_path / RAW).open()))
    assert [(r["variant"], r["seed"], r["success"], r["env_steps_to_75"]) for r in rows] == [
        ("Sub TB (λ)", "0", "0.8", "300"),
        ("Sub TB (λ)", "1", "0.9", "300"),
        ("DB", "0", "0.5", ""),
        ("DB", "1", "0.6", ""),
    ]
    for picture in (PICTURE, CURVES):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_figures_by_kind_of_task_and_of_a_base_model_that_stayed_best(tmp_path):
    columns = tuple(Column(kind, kind, "success_by_category", category=kind) for kind in ("cool", "heat"))
    variants = (Variant("Sub TB (λ)", "numberline", value=0.5),)
    experiment = Experiment("kinds", "t", "s", variants, columns, Line(("cool",), "x"))
    (trial,) = select(tmp_path, experiment, seeds=1).trials().chosen
    finish(trial, 0.4, versions=(0, 0))
    text = write_results(experiment, [trial], tmp_path)
    assert "| Sub TB (λ) | 1 | 20.0 | - |" in text


def test_before_and_after_are_told_by_version_not_by_the_order_in_which_they_were_played(tmp_path):
    (trial,) = select(tmp_path, only=["db"], seeds=1).trials().chosen
    finish(trial, 0.8)
    expected = write_results(SMALL, [trial], tmp_path)
    summary = json.loads(trial.run.folder.summary.read_text())
    summary["report"].reverse()
    trial.run.folder.summary.write_text(json.dumps(summary))
    assert write_results(SMALL, [trial], tmp_path) == expected


def test_without_an_evaluation_at_the_start_nothing_is_said_of_what_was_lost_since(tmp_path):
    (trial,) = select(tmp_path, only=["db"], seeds=1).trials().chosen
    finish(trial, 0.8)
    metrics = trial.run.folder.metrics
    later = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] > 0]
    metrics.write_text("".join(f"{line}\n" for line in later))
    assert figures(SMALL, trial)[AT_START] is None
    assert figures(SMALL, trial)[AT_END] == 0.8


def test_there_is_no_diversity_where_nothing_was_solved(tmp_path):
    (trial,) = select(tmp_path, only=["db"], seeds=1).trials().chosen
    finish(trial, 0.0)
    assert "| DB | 1 | 40.0 | 0.0 | - | 0.0 | - | 300 | - | 2.0 |" in write_results(SMALL, [trial], tmp_path)


def test_a_run_that_unlearned_what_it_began_with_is_told_though_its_best_adapter_is_good(tmp_path):
    kept, lost = select(tmp_path, only=["db"]).trials().chosen
    finish(kept, 0.3)
    finish(lost, 0.1)
    text = write_results(SMALL, [kept, lost], tmp_path)
    assert "* DB: in 1 of 2 runs success fell from 40.0 percent to 10.0 while training; the table has the best" in text
    assert "success fell" not in write_results(SMALL, [kept], tmp_path)


def test_the_table_is_of_all_finished_runs_with_these_settings_in_the_folder(tmp_path):
    (old,) = select(tmp_path, only=["db"], seeds=1, overrides=["learner.steps=9"]).trials().chosen
    finish(old, 0.8)
    first = select(tmp_path, only=["sub-tb"], seeds=3).trials().chosen[2]
    finish(first, 0.8)
    assert [trial.name for trial in select(tmp_path, only=["db"], seeds=1).finished()] == ["sub-tb-2"]
