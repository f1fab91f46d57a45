"""One experiment from its description to its table."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from gflowvlm.run.folder_lock import folder_lock
from gflowvlm.run.interruption import STOPPING, handled_by
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments.progress import ExperimentDisplay, expected_minutes
from gflowvlm.studies.experiments.results import CURVES, PICTURE, RAW, TABLE, write_results
from gflowvlm.studies.experiments.trial_process import last_log_lines
from gflowvlm.studies.experiments.trials import Selection, Trial, TrialList, check_models
from gflowvlm.studies.experiments.warm_starting import is_made, make_warm_start


def run_experiment(selection: Selection, console: Console, *, concurrent: int, retries: int) -> bool:
    """Runs the trials that are not finished, and writes the results anew after each of them.

    Args:
        selection: The trials, and where they stand.
        console: Where progress is shown.
        concurrent: How many run at a time.
        retries: How often a failed one is tried again.

    Returns:
        Whether it came to its end (and was not interrupted).

    Raises:
        UserError: Nothing can be run, the folder holds runs with other settings or is in use, or trials failed.
    """
    chosen = selection.trials()
    for line in chosen.left_out:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(chosen.chosen) == 0:
        raise UserError(f"experiment {selection.experiment.name}: {'; '.join(chosen.left_out)}")
    todo = {trial.name: trial for trial in chosen.chosen if not trial.finished}
    check_models(todo.values())
    held = UserError(f"{selection.out}: another `gflowvlm experiment` is running there; wait, or name another --out")
    with folder_lock(selection.out, held):
        for trial in chosen.chosen:
            trial.prepare()
        if todo and not _run_all(selection, todo, chosen, console, concurrent, retries):
            return False
        _show_results(selection, console)
    failed = [trial for trial in todo.values() if not trial.finished]
    if failed:
        raise UserError(_failures(failed))
    return True


def _run_all(
    selection: Selection, todo: Mapping[str, Trial], chosen: TrialList, console: Console, concurrent: int, retries: int
) -> bool:
    """Makes the models that trials start from, then runs the trials; returns whether nobody stopped it."""
    with _stop_file() as stop:
        made = all(
            is_made(folder) or make_warm_start(start, folder, stop.exists) for start, folder in chosen.warm_starts
        )
        if made and not stop.exists():
            _run(selection, todo, len(chosen.chosen) - len(todo), stop, console, concurrent, retries)
        return not stop.exists()


def _run(
    selection: Selection,
    todo: Mapping[str, Trial],
    done: int,
    stop: Path,
    console: Console,
    concurrent: int,
    retries: int,
) -> None:
    # Brings Ray, which takes seconds.
    from gflowvlm.studies.experiments.tuning import run_trials

    longest = max(trial.run.config.learner.steps for trial in todo.values())
    known = list(selection.finished())
    per_run = expected_minutes(known, selection.scale, longest)
    unfinished = dict(todo)
    failures: dict[str, int] = {}
    stopping_said = False

    with ExperimentDisplay(console, todo, done, per_run, concurrent) as display:

        def on_step(running: Sequence[str], failed: Mapping[str, int]) -> None:
            nonlocal stopping_said
            if stop.exists() and not stopping_said:
                stopping_said = True
                display.say("stopping: the running trials end their step and write a checkpoint")
            display.update(running)
            for name, count in failed.items():
                if count > failures.get(name, 0):
                    failures[name] = count
                    again = "; tried again" if count <= retries else "; given up"
                    display.say(f"failed: {name}: {last_log_lines(todo[name].log)} (see {todo[name].log}){again}")
            for name in [name for name in unfinished if unfinished[name].finished]:
                known.append(unfinished.pop(name))
                write_results(selection.experiment, list(selection.finished()), selection.out)
                display.finish(name, expected_minutes(known, selection.scale, longest))

        display.say(f"runs to do: {len(todo)}, done: {done}; each is a `gflowvlm train` in {selection.out}")
        run_trials(list(todo.values()), stop, on_step, concurrent=concurrent, retries=retries)


def _show_results(selection: Selection, console: Console) -> None:
    finished = list(selection.finished())
    if len(finished) == 0:
        return
    table = write_results(selection.experiment, finished, selection.out)
    console.print(table, highlight=False, markup=False, soft_wrap=True)
    written = ", ".join(str(selection.out / name) for name in (TABLE, RAW, PICTURE, CURVES))
    console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)


def _failures(failed: Sequence[Trial]) -> str:
    first = failed[0]
    others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"{first.name}{others} failed, last: {last_log_lines(first.log)} (see {first.log}); the same command goes on"


@contextmanager
def _stop_file() -> Iterator[Path]:
    """Yields a file that is there from the first Ctrl-C, SIGTERM or SIGHUP on; a second one interrupts."""
    with tempfile.TemporaryDirectory(prefix="gflowvlm-stop-") as folder:
        stop = Path(folder) / "stop"

        def remember(number: int, frame: FrameType | None) -> None:
            if stop.exists():
                raise KeyboardInterrupt
            stop.touch()

        with handled_by(remember, *STOPPING):
            yield stop
