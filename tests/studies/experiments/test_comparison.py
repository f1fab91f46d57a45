import csv
import dataclasses
import json

import pytest

from gflowvlm.evaluation.exact_match import ExactMatch
from gflowvlm.run.log import append_row
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments.comparison import (
    CURVES,
    EXACT_COMPARED,
    RAW,
    TABLE,
    ComparedRun,
    at_env_steps,
    exact_of,
    figures,
    markdown_table,
    measure_exact,
    write_comparison,
)
from gflowvlm.studies.experiments.sweep import EvaluatedAt, cell


def report(version, split, success):
    return {
        "version": version,
        "split": split,
        "success": success,
        "div_at_n": 2 + success,
        "total_variation": 1 - success,
        "malformed_rate": 0.01,
    }


@pytest.fixture
def make_run(tmp_path):
    def make(loss, seed, after=None):
        run = ComparedRun.of(RunConfig(objective={"loss": loss}, seed=seed), tmp_path)
        run.prepare()
        if after is not None:
            append_row(run.folder.metrics, "rollout", {"step": 10, "env_steps": 100 + 100 * seed})
        for step, success in ((0, 0.4), (10, after)):
            if success is not None:
                append_row(run.folder.metrics, "evaluation", {"step": step, **report(step, "id", success)})
        if after is not None:
            run.folder.adapter(1).mkdir()
            run.folder.adapter(2).mkdir()
            rows = [report(v, s, x) for s in ("id", "ood") for v, x in ((0, 0.4), (2, after))]
            summary = {"steps": 10, "version": 2, "wall_s": 60 * seed, "peak_memory_gib": None, "report": rows}
            run.folder.summary.write_text(json.dumps(summary))
        return run

    return make


def tables(text):
    """The tables of a Markdown text, each a line's cells by its first and the column's name."""
    found = []
    for part in text.split("\n\n"):
        if part.startswith("|"):
            head, _, *lines = [line.strip("| ").split(" | ") for line in part.splitlines()]
            found.append({line[0]: dict(zip(head, line, strict=True)) for line in lines})
    return found


def test_the_table_has_mean_and_deviation_over_the_seeds_of_finished_runs(make_run, tmp_path):
    runs = [make_run("var_tb", 0, 0.8), make_run("var_tb", 1, 0.9), make_run("subtb", 0, 0.95), make_run("subtb", 1)]
    table = write_comparison(runs, tmp_path)
    reached, took = tables(table)
    assert reached["before training"]["success"] == "0.40 ± 0.00"
    assert reached["before training"]["seeds"] == "3"
    assert reached["var_tb"]["success"] == "0.85 ± 0.07"
    assert reached["var_tb"]["Div@N"] == "2.85 ± 0.07"
    assert reached["var_tb"]["exact: outcomes"] == "-"
    assert reached["subtb"]["success"] == "0.95"
    assert took["var_tb"]["minutes"] == "0.5 ± 0.7"
    assert took["var_tb"]["environment steps in all"] == "150 ± 71"
    assert took["var_tb"]["versions"] == "2"
    assert (tmp_path / TABLE).read_text() == table
    rows = list(csv.DictReader((tmp_path / RAW).open()))
    assert [(r["loss"], r["seed"], r["ood_success_after"]) for r in rows] == [
        ("var_tb", "0", "0.8"),
        ("var_tb", "1", "0.9"),
        ("subtb", "0", "0.95"),
    ]
    assert (tmp_path / CURVES).read_bytes().startswith(b"\x89PNG")


def test_runs_that_played_differently_much_are_compared_after_equally_many_environment_steps(make_run, tmp_path):
    # They are evaluated at 0.4 before and at 0.8 after 100 and 200 environment steps.
    table = write_comparison([make_run("var_tb", 0, 0.8), make_run("subtb", 1, 0.8)], tmp_path)
    assert "After 100 environment steps" in table
    _, at = tables(table)
    assert [at[loss]["success"] for loss in ("var_tb", "subtb")] == ["0.80", "0.60"]
    assert [at[loss]["Div@N"] for loss in ("var_tb", "subtb")] == ["2.80", "2.60"]
    assert [at[loss]["total variation"] for loss in ("var_tb", "subtb")] == ["0.20", "0.40"]


def test_a_run_made_with_other_settings_is_not_taken_for_one_of_the_comparison(make_run, tmp_path):
    make_run("var_tb", 0, 0.8)
    ComparedRun.of(RunConfig(), tmp_path).prepare()
    other = ComparedRun.of(RunConfig(learner={"steps": 7}), tmp_path)
    with pytest.raises(UserError, match="other settings"):
        other.prepare()


def test_a_run_whose_start_stayed_best_counts_with_it(make_run, tmp_path):
    run = make_run("var_tb", 0, 0.8)
    rows = [report(0, split, success) for split in ("id", "ood") for success in (0.4, 0.3)]
    run.folder.summary.write_text(
        json.dumps({**json.loads(run.folder.summary.read_text()), "version": 0, "report": rows})
    )
    reached, _ = tables(write_comparison([run, make_run("var_tb", 1, 0.9)], tmp_path))
    assert reached["before training"]["success"] == "0.40 ± 0.00"
    assert reached["var_tb"]["success"] == "0.60 ± 0.42"


def test_a_run_that_solved_nothing_has_no_diversity(make_run, tmp_path):
    run = make_run("var_tb", 0, 0.8)
    rows = [report(0, "id", 0.4), {**report(2, "id", 0.0), "div_at_n": 0.0}]
    run.folder.summary.write_text(json.dumps({**json.loads(run.folder.summary.read_text()), "report": rows}))
    reached, _ = tables(write_comparison([run, make_run("var_tb", 1, 0.9)], tmp_path))
    assert reached["var_tb"]["Div@N"] == "2.90 (1 of 2)"


def test_a_damaged_summary_is_named(make_run):
    run = make_run("var_tb", 0, 0.8)
    run.folder.summary.write_text("{")
    with pytest.raises(UserError, match=r"summary\.json"):
        figures(run)


def test_a_figure_that_no_run_has_is_left_blank():
    reached, took = tables(markdown_table([{"loss": "db", "seed": 0, "id_success_before": None}], 0))
    assert reached["before training"]["success"] == reached["db"]["success"] == took["db"]["success"] == "-"


def test_what_only_some_runs_have_says_of_how_many_it_is():
    rows = [{"steps": 300}, {"steps": 500}, {"steps": None}]
    assert cell(rows, "steps", 0) == "400 ± 141 (2 of 3)"
    assert cell(rows[:1], "steps", 0) == cell([rows[0], rows[0]], "steps", 0) == "300"


def test_exact_figures_stand_in_the_table_once_they_are_measured(make_run, tmp_path):
    run = make_run("var_tb", 0, 0.8)
    exact = dict.fromkeys(EXACT_COMPARED, 0.25)
    run.exact.write_text(json.dumps({"instances": 1, "version": 2, "before": exact, "after": exact}))
    reached, _ = tables(write_comparison([run], tmp_path))
    assert [reached[loss]["exact: sequences"] for loss in ("before training", "var_tb")] == ["0.25", "0.25"]


class KnownCheck:
    """Answers as an `ExactCheck`, from the number of the adapter version."""

    instances = 3

    def __init__(self):
        self.base = self._match(0)
        self.measured = []

    def measure(self, adapter):
        version = int(adapter.name.removeprefix("v"))
        self.measured.append((adapter.parents[1].name, version))
        return self._match(version)

    def _match(self, version):
        return ExactMatch(**{field.name: 0.1 * (version + 1) for field in dataclasses.fields(ExactMatch)})


def test_a_runs_best_adapter_is_measured_and_set_beside_the_base_model(make_run):
    check = KnownCheck()
    runs = [make_run("var_tb", 0, 0.8), make_run("subtb", 0, 0.9)]
    for run in runs:
        measure_exact(run, check)
    assert check.measured == [("var_tb-0", 2), ("subtb-0", 2)]
    assert figures(runs[1])["exact_total_variation_before"] == pytest.approx(0.1)
    assert figures(runs[1])["exact_aim_total_variation_after"] == pytest.approx(0.3)


def test_nothing_is_written_where_the_trees_are_too_large(make_run):
    check = KnownCheck()
    check.base = None
    run = make_run("var_tb", 0, 0.8)
    measure_exact(run, check)
    assert check.measured == []
    assert not run.exact.exists()


def test_an_exact_match_says_of_how_many_instances_it_is(make_run):
    run = make_run("var_tb", 0, 0.8)
    assert exact_of(run) == 0
    measure_exact(run, KnownCheck())
    assert exact_of(run) == 3
    run.exact.write_text("[]")
    with pytest.raises(UserError, match="is no exact match"):
        exact_of(run)


def test_between_evaluations_diversity_counts_only_those_that_solved_something():
    rows = [(0, 0.0), (100, 0.5), (200, 0.5)]
    evaluated = [EvaluatedAt(at, at, {**report(1, "id", success), "div_at_n": 4 * success}) for at, success in rows]
    assert at_env_steps(evaluated, 50)["div_at_n_at_env_steps"] == 2.0
    assert at_env_steps(evaluated, 50)["success_at_env_steps"] == 0.25
