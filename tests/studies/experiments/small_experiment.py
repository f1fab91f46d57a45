"""A small experiment of two variants, its trials, and what finished ones leave."""

import json

from gflowvlm.run.log import append_row
from gflowvlm.studies.experiments.description import Bars, Column, Experiment, Variant, WarmStart
from gflowvlm.studies.experiments.trials import Selection

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
