"""Keeps what finished experiments showed: records for the repository, tables and pictures for docs/results.md.

`python scripts/results.py [NAME ...]` takes the finished runs of `gflowvlm experiment NAME --scale tiny` in
runs/experiments, with their presets' own settings; without a name, every experiment that has some.
"""

import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gflowvlm.run.log import read_rows
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments.catalog import EXPERIMENTS, find_experiment
from gflowvlm.studies.experiments.description import Experiment, Scale
from gflowvlm.studies.experiments.results import CURVES, PICTURE, write_results
from gflowvlm.studies.experiments.trials import Selection, Trial

ROOT = Path(__file__).resolve().parent.parent
SCALE: Scale = "tiny"
ROW_KINDS = ("learner", "evaluation")
ROLLOUT_FIGURES = ("kind", "time", "step", "env_steps")


def keep(experiment: Experiment, runs: Path, docs: Path) -> int:
    """Writes an experiment's records, pictures and table below the documentation's folder.

    Args:
        experiment: The experiment.
        runs: Folder of the experiments' folders.
        docs: The documentation: ``data/`` gets the records, ``results/`` the pictures, ``results.md`` the table.

    Returns:
        How many finished runs there are; nothing is written for none.

    Raises:
        UserError: A run cannot be read, or ``results.md`` has no place for the table.
    """
    name = f"{experiment.name}-{SCALE}"
    trials = list(Selection(experiment, SCALE, 1, (), (), runs / name).finished())
    if len(trials) == 0:
        return 0
    with tempfile.TemporaryDirectory() as made:
        text = write_results(experiment, trials, Path(made))
        page = docs / "results.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), experiment.name, text, minutes(trials)), "utf-8")
        (docs / "results").mkdir(exist_ok=True)
        for picture, said in ((PICTURE, experiment.name), (CURVES, f"{experiment.name}-curves")):
            shutil.copyfile(Path(made) / picture, docs / "results" / f"{said}.png")
        for trial in trials:
            copy_records(trial, Path(made) / name / trial.name)
        (docs / "data").mkdir(exist_ok=True)
        with tarfile.open(docs / "data" / f"{name}.tar.xz", "w:xz") as packed:
            packed.add(Path(made) / name, name)
    return len(trials)


def copy_records(trial: Trial, to: Path) -> None:
    """Copies what an experiment reads of a finished trial: enough for the same table, not for training on."""
    folder = trial.run.folder
    to.mkdir(parents=True)
    evaluations = (trial.evaluation(split, temperature) for split, temperature in trial.temperatures)
    for path in (folder.config, folder.summary, *evaluations):
        shutil.copyfile(path, to / path.name)
    rows = [row for row in read_rows(folder.metrics) if row["kind"] in ROW_KINDS]
    played = [row for row in read_rows(folder.metrics) if row["kind"] == "rollout"]
    rows += [{figure: row[figure] for figure in ROLLOUT_FIGURES} for row in played]
    rows.sort(key=lambda row: row["time"])
    (to / folder.metrics.name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (to / folder.adapters.name).mkdir()
    for version in folder.adapters.iterdir():
        if version.is_dir():
            (to / folder.adapters.name / version.name).mkdir()


def minutes(trials: Sequence[Trial]) -> float:
    """Returns the minutes that all runs took together; of a resumed one, its last part."""
    summaries = (json.loads(trial.run.folder.summary.read_text(encoding="utf-8")) for trial in trials)
    return sum(summary["wall_s"] for summary in summaries) / 60


def with_table(page: str, name: str, text: str, took: float) -> str:
    """Returns the page with an experiment's table between its two marks.

    Raises:
        UserError: The marks are not there.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise UserError(f"results.md: no {begin.strip()} and {end.strip()}, between which the table belongs")
    title, _, body = text.partition("\n")
    said = f"`gflowvlm experiment {name}`, at least {took:.0f} minutes of runs.\n"
    pictures = f"![{name}](results/{name}.png)\n\n![{name}, while training](results/{name}-curves.png)\n"
    return f"{before}{begin}#{title}\n\n{said}{body}\n{pictures}{end}{after}"


def main(names: Sequence[str]) -> int:
    """Keeps the named experiments; returns the exit status."""
    try:
        for experiment in [find_experiment(name) for name in names] or EXPERIMENTS.values():
            count = keep(experiment, ROOT / "runs" / "experiments", ROOT / "docs")
            print(f"{experiment.name}: {count} finished runs{'' if count else ', nothing to keep'}")
    except UserError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
