"""The experiments without running any: their descriptions, trials, what is resumed, tables and progress."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.evaluation.figures import REPORT_SEED_OFFSET
from cluster.experiments import sweep
from cluster.experiments import trials as trials_module
from cluster.experiments.catalog import EXPERIMENTS
from cluster.experiments.description import SCALES, Bars, Column, Experiment, Line, Variant, WarmStart
from cluster.experiments.progress import Following, expected_minutes, minutes_left, said_minutes
from cluster.experiments.results import AT_END, AT_START, CURVES, PICTURE, RAW, TABLE, figures, write_results
from cluster.experiments.running import run_experiment
from cluster.experiments.trial_process import TrialFailedError, TrialJob, last_words, run_job
from cluster.experiments.trials import Command, Selection, missing_part
from cluster.experiments.warm_starting import is_made, make_warm_start, warm_start_command
from cluster.interruption import INTERRUPTED
from cluster.models import resolve_model
from cluster.preset_library import load_preset, preset_names
from cluster.run.run_log import append_row
from cluster.warm_starts import supervised
from shared.errors import UserError

STARTED = WarmStart("taught", ("--task", "numberline", "--noise", "0"))

SMALL = Experiment(
    name="small",
    title="two losses",
    source="Table 0",
    variants=(
        Variant("Sub TB (λ)", "numberline", ("objective.loss=subtb",), paper={"success": 60.0}),
        Variant("DB", "numberline", ("objective.loss=db",), {"tiny": STARTED}),
    ),
    columns=(
        Column("start", "start", before=True),
        Column("success", "success"),
        Column("ood", "ood", split="ood"),
        Column("hot", "hot", "div_at_n", temperature=1.5, percent=False),
    ),
    picture=Bars(("success", "hot")),
    notes=("A note.",),
)


def select(out, experiment=SMALL, *, seeds=2, only=(), overrides=(), scale="tiny"):
    return Selection(experiment, scale, seeds, tuple(only), tuple(overrides), out)


def report(version, split, success):
    return {
        "version": version,
        "split": split,
        "success": success,
        "success_by_category": {"cool": success / 2},
        "div_at_n": 2 + success,
        "total_variation": 1 - success,
        "malformed_rate": 0.01,
    }


def finish(trial, after, *, versions=(0, 2), evaluated=True):
    """Leaves what a whole run leaves that went from 0.4 to a success."""
    trial.run.prepare()
    folder = trial.run.folder
    for step, success, env_steps in ((0, 0.4, 50), (10, after / 2, 200), (20, after, 300)):
        append_row(folder.metrics, "rollout", {"step": step, "env_steps": env_steps})
        append_row(folder.metrics, "evaluation", {"step": step, **report(1, "id", success)})
    rows = [report(v, s, x) for s in ("id", "ood") for v, x in zip(versions, (0.4, after), strict=True)]
    summary = {"steps": 20, "version": versions[1], "wall_s": 120, "peak_memory_gib": 5.0, "report": rows}
    folder.summary.write_text(json.dumps(summary))
    if evaluated:
        for split, temperature in trial.temperatures:
            trial.evaluation(split, temperature).write_text(json.dumps({"success": after, "div_at_n": 1 + after}))


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_variant_of_a_shipped_preset_resolves_to_a_configuration(experiment, scale, tmp_path):
    chosen = select(tmp_path, experiment, scale=scale, seeds=1)
    shipped = [v for v in experiment.variants if v.preset(scale) in preset_names() and missing_part(v, scale) is None]
    trials = chosen.trials().chosen
    assert [trial.variant for trial in trials] == shipped
    if scale == "paper":
        assert len(shipped) == len(experiment.variants)
    for trial in trials:
        assert trial.run.config.task.name == trial.variant.task
        assert not trial.run.config.cluster.dashboard


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_variants_of_a_shipped_preset_are_all_different_runs(experiment, scale, tmp_path):
    configs = [trial.run.config for trial in select(tmp_path, experiment, scale=scale, seeds=1).trials().chosen]
    assert len({repr(config) for config in configs}) == len(configs)


@pytest.mark.parametrize("name", ["alfworld", "markovian"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_markovian_variant_has_no_past_in_its_prompts_and_a_tiny_policy_has_learned_its_kind(name, scale, tmp_path):
    for trial in select(tmp_path, EXPERIMENTS[name], scale=scale, seeds=1).trials().chosen:
        task, start = trial.run.config.task, trial.variant.warm_starts.get(scale)
        if "Markovian" in trial.variant.name:
            assert task.prompt == ("history" if "non-Markovian" in trial.variant.name else "markov")
        if start is not None:
            assert f"prompt={task.prompt}" in start.arguments
        elif scale == "tiny":
            made = json.loads((Path(resolve_model(trial.run.config.policy.model)) / "training.json").read_text())
            assert made["request"]["task"]["prompt"] == task.prompt


def test_warm_starts_are_commands_that_gflowvlm_sft_takes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(supervised, "start", lambda request, *_: asked.append(request) or True)
    starts = {s for e in EXPERIMENTS.values() for v in e.variants for s in v.warm_starts.values()}
    for start in starts:
        result = CliRunner().invoke(app, list(warm_start_command(start, tmp_path / start.name)))
        assert result.exit_code == 0, result.output
    assert len(asked) == len(starts) >= 6


def test_the_alfworld_table_holds_the_papers_figures_of_all_columns():
    alfworld = EXPERIMENTS["alfworld"]
    trained = {column.key for column in alfworld.columns if not column.before}
    assert all(set(variant.paper) == trained for variant in alfworld.variants)


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


def test_trials_come_seed_by_seed_each_in_a_folder_of_its_own(tmp_path):
    trials = select(tmp_path).trials().chosen
    assert [trial.name for trial in trials] == ["sub-tb-0", "db-0", "sub-tb-1", "db-1"]
    assert [trial.run.config.seed for trial in trials] == [0, 0, 1, 1]
    assert {trial.run.folder.root.parent for trial in trials} == {tmp_path.resolve()}
    assert trials[0].run.config.objective.loss == "subtb"


def test_settings_of_the_call_come_after_the_variants(tmp_path):
    (trial,) = (
        select(tmp_path, only=["db"], seeds=1, overrides=["learner.steps=3", "objective.loss=tb"]).trials().chosen
    )
    assert (trial.run.config.learner.steps, trial.run.config.objective.loss) == (3, "tb")


def test_only_takes_names_and_slugs_and_says_which_there_are(tmp_path):
    assert {t.variant.name for t in select(tmp_path, only=["DB"]).trials().chosen} == {"DB"}
    assert {t.variant.name for t in select(tmp_path, only=["sub-tb"]).trials().chosen} == {"Sub TB (λ)"}
    with pytest.raises(UserError, match="did you mean 'sub-tb'"):
        select(tmp_path, only=["subtb"]).trials()


def test_a_variant_starts_from_the_model_that_is_made_for_it(tmp_path):
    chosen = select(tmp_path).trials()
    made = tmp_path.resolve() / "models" / "taught"
    assert list(chosen.warm_starts) == [(STARTED, made)]
    models = {trial.variant.name: trial.run.config.policy.model for trial in chosen.chosen}
    assert models == {"Sub TB (λ)": "numberline-tiny", "DB": str(made)}
    paper = select(tmp_path, scale="paper").trials()
    assert paper.warm_starts == ()
    assert {trial.run.config.policy.model for trial in paper.chosen} == {"models/numberline-7b"}
    own = select(tmp_path, overrides=["policy.model=numberline-tiny"]).trials()
    assert own.warm_starts == ()


def test_a_warm_start_is_begun_resumed_or_left_alone(tmp_path):
    folder = tmp_path / "taught"
    assert warm_start_command(STARTED, folder) == ("sft", "--out", str(folder), *STARTED.arguments)
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "training.json").write_text("{}")
    assert warm_start_command(STARTED, folder) == ("sft", "--resume", "--out", str(folder))
    assert not is_made(folder)
    (folder / "training.json").write_text('{"final_loss": 0.1}')
    assert is_made(folder)


def test_a_warm_start_that_stopped_before_its_first_checkpoint_is_begun_anew(tmp_path, monkeypatch):
    folder = tmp_path / "taught"
    folder.mkdir()
    (folder / "training.json").write_text("{}")
    asked = []

    def run_command(arguments, *, stop):
        asked.append(arguments)
        assert not folder.exists()
        if len(asked) == 1:
            return INTERRUPTED
        folder.mkdir()
        (folder / "training.json").write_text('{"final_loss": 0.1}')
        return 0

    monkeypatch.setattr("cluster.experiments.warm_starting.run_command", run_command)
    assert not make_warm_start(STARTED, folder, lambda: False)
    assert make_warm_start(STARTED, folder, lambda: False)
    assert asked == [("sft", "--out", str(folder), *STARTED.arguments)] * 2


def test_a_preset_that_is_not_shipped_yet_is_named_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trials_module, "preset_names", lambda: ["numberline-tiny"])
    experiment = EXPERIMENTS["markovian"]
    chosen = select(tmp_path, experiment, seeds=3).trials()
    assert {trial.variant.task for trial in chosen.chosen} == {"numberline"}
    blackjack, alfworld = chosen.left_out
    assert "'blackjack-tiny' are not shipped yet: 12 trials" in blackjack
    assert "too long for alfworld-tiny (docs/recipe.md): 12 trials" in alfworld
    with pytest.raises(UserError, match="the model and preset 'alfworld-tiny' are not shipped yet"):
        run_experiment(select(tmp_path, EXPERIMENTS["alfworld"]), Console(quiet=True), concurrent=1, retries=0)


def test_a_preset_whose_model_is_not_shipped_yet_is_named(monkeypatch):
    monkeypatch.setattr(trials_module, "shipped_models", list)
    assert missing_part(SMALL.variants[0], "tiny") == (
        "the model 'numberline-tiny' of preset 'numberline-tiny' is not shipped yet"
    )
    # Whoever runs the large ones brings their models.
    assert missing_part(SMALL.variants[0], "paper") is None


def test_a_model_that_the_user_has_to_make_is_asked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = select(tmp_path / "out", EXPERIMENTS["motivating"], scale="paper", seeds=1)
    with pytest.raises(UserError, match=r"gflowvlm sft --task numbersequence .* --out models/sequence-7b"):
        run_experiment(chosen, Console(quiet=True), concurrent=1, retries=0)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_trial_is_left_alone_and_an_unfinished_one_goes_on_where_it_stood(tmp_path):
    fresh, half = select(tmp_path, only=["db"]).trials().chosen
    assert [command.arguments[0] for command in fresh.commands] == ["train", "eval"]
    finish(fresh, 0.8)
    finish(half, 0.8, evaluated=False)
    assert fresh.finished
    (evaluation,) = half.commands
    said = " ".join(evaluation.arguments)
    settings = half.run.config.evaluation
    assert f"eval {half.run.folder.root} --split id" in said
    assert f"--seed {settings.seed + REPORT_SEED_OFFSET} --temperature 1.5" in said
    assert evaluation.written != evaluation.result
    assert [trial.name for trial in select(tmp_path).finished()] == ["db-0"]


def test_a_trial_does_what_is_left_and_nothing_once_it_is_to_stop(tmp_path, monkeypatch):
    asked = []

    def run_command(arguments, *, stop, log, directory, environment):
        asked.append(arguments)
        log.write_text("working\n\ngflowvlm: no space\n")
        (tmp_path / "a.partial").write_text("{}")
        return 2 if arguments == ("b",) else 0

    monkeypatch.setattr("cluster.experiments.trial_process.run_command", run_command)
    done = Command(("done",), tmp_path / "done", tmp_path / "done")
    done.result.touch()
    good = Command(("a",), tmp_path / "a", tmp_path / "a.partial")
    bad = Command(("b",), tmp_path / "b", tmp_path / "b")
    job = TrialJob((done, good, bad), tmp_path / "log", tmp_path / "stop", str(tmp_path), frozenset({"PATH"}))
    with pytest.raises(TrialFailedError, match=r"`b` ended \(status 2\): gflowvlm: no space"):
        run_job(job)
    assert asked == [("a",), ("b",)]
    assert good.result.exists()
    job.stop.touch()
    run_job(job)
    assert len(asked) == 2


def test_the_last_words_of_a_log_are_those_that_say_something(tmp_path):
    assert last_words(tmp_path / "none") == "it said nothing"
    log = tmp_path / "log"
    log.write_text("x" * 10_000 + "\nlast\n  \nx.py:1: UserWarning: leaked objects\n  warnings.warn('leaked %d')\n")
    assert last_words(log) == "last"


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


def test_nothing_runs_where_all_is_finished(tmp_path, monkeypatch):
    for trial in select(tmp_path).trials().chosen:
        finish(trial, 0.8)

    def run_trials(*arguments, **settings):
        raise AssertionError("a finished trial was run again")

    monkeypatch.setattr("cluster.experiments.tuning.run_trials", run_trials)
    console = Console(record=True, width=200, quiet=True)
    assert run_experiment(select(tmp_path), console, concurrent=1, retries=0)
    assert (tmp_path / TABLE).exists()


def test_runs_made_with_other_settings_are_not_mixed_with_these(tmp_path):
    for trial in select(tmp_path, only=["sub-tb"], seeds=1).trials().chosen:
        trial.run.prepare()
    other = select(tmp_path, only=["sub-tb"], seeds=1, overrides=["learner.steps=7"])
    with pytest.raises(UserError, match="other settings"):
        run_experiment(other, Console(quiet=True), concurrent=1, retries=0)


def test_an_experiment_goes_on_in_another_folder_than_the_one_where_it_was_begun(tmp_path, monkeypatch):
    for trial in select(tmp_path / "begun", only=["db"], seeds=1).trials().chosen:
        finish(trial, 0.8)
    (tmp_path / "begun").rename(tmp_path / "moved")
    monkeypatch.setattr("cluster.experiments.running.make_warm_start", lambda *arguments: True)
    monkeypatch.setattr(
        "cluster.experiments.tuning.run_trials", lambda trials, *arguments, **settings: ran.extend(trials)
    )
    ran = []
    with pytest.raises(UserError, match="db-1 failed"):
        run_experiment(select(tmp_path / "moved", only=["db"]), Console(quiet=True), concurrent=1, retries=0)
    assert [trial.name for trial in ran] == ["db-1"]


def test_the_time_a_run_takes_is_that_of_the_finished_ones_or_the_presets(tmp_path):
    (trial,) = select(tmp_path, only=["db"], seeds=1).trials().chosen
    assert expected_minutes([], "tiny", 60) == 7.0
    assert expected_minutes([], "tiny", 30) == 3.5
    assert expected_minutes([], "paper", 60) is None
    finish(trial, 0.8)
    assert expected_minutes([trial], "tiny", 60) == 2.0


def test_the_time_left_counts_what_is_done_and_how_many_run_at_a_time():
    assert minutes_left([0.5, 0.0, 0.0], 10.0, 1) == 25.0
    assert minutes_left([0.5, 0.0, 0.0], 10.0, 2) == 12.5
    assert minutes_left([0.5], 10.0, 8) == 5.0
    assert minutes_left([], 10.0, 1) == 0.0
    assert minutes_left([0.5], None, 1) is None
    assert (said_minutes(None), said_minutes(45), said_minutes(150)) == ("unknown", "45 min", "2.5 h")


def test_a_running_trial_is_followed_by_its_log(tmp_path):
    (trial,) = select(tmp_path, only=["db"], seeds=1).trials().chosen
    trial.run.prepare()
    following = Following(trial)
    following.update()
    assert (following.step, following.success, following.changed) == (0, None, False)
    append_row(trial.run.folder.metrics, "step", {"step": 30})
    append_row(trial.run.folder.metrics, "rollout", {"step": 30, "rollout_success": 0.25})
    following.update()
    assert (following.share, following.success, following.changed) == (0.5, 0.25, True)
    append_row(trial.run.folder.metrics, "learner", {"step": 15})
    append_row(trial.run.folder.metrics, "evaluation", {"step": 15, "success": 0.75})
    append_row(trial.run.folder.metrics, "report", {"step": 15, "version": 0, "success": 0.4})
    following.update()
    assert following.describe() == "db-0  step 15/60  success 0.75"


def test_presets_of_all_experiments_are_named_after_task_and_scale():
    presets = {v.preset(scale) for e in EXPERIMENTS.values() for v in e.variants for scale in SCALES}
    assert presets == {f"{t}-{s}" for t in ("numberline", "blackjack", "sequence", "alfworld") for s in ("tiny", "7b")}
    assert load_preset("sequence-7b").task.name == "numbersequence"
