"""Compares our losses with torchgfn's, then the time both need on the hypergrid. Runs in `.venv-torchgfn`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from gflowvlm.studies.proving.torchgfn import agreement, speed
from gflowvlm.studies.proving.torchgfn.report import (
    TOLERANCE,
    Agreement,
    TimedTraining,
    agreement_table,
    speed_comparisons,
    speed_table,
    write,
)


def say(text: str) -> None:
    """Prints a line at once, also through a pipe."""
    print(f"compare-torchgfn: {text}", flush=True)


def compare_losses() -> list[Agreement]:
    """Returns what every comparison found, computed in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        problems = agreement.make_problems()
        steps = torch.cat([problem.inputs["length"] for problem in problems])
        say(
            f"losses in float64 on {len(steps)} random trajectories of {int(steps.min())} to {int(steps.max())} steps, "
            f"in batches of {agreement.BATCH_SIZE}"
        )
        return list(agreement.compare(problems))
    finally:
        torch.set_default_dtype(torch.float32)


def time_trainings(seeds: int) -> list[TimedTraining]:
    """Returns all trainings, and says how they went on the way."""
    trainings: list[TimedTraining] = []
    for pair in speed.timed_trainings(seeds):
        trainings += pair
        took = [
            f"{training.library} {'–' if training.seconds is None else f'{training.seconds:.2f} s'}"
            for training in pair
        ]
        say(f"  {pair[0].loss}, seed {pair[0].seed}: {', '.join(took)}")
    return trainings


def setting() -> dict[str, str]:
    """Returns the versions and the machine."""
    versions = {name: version(name) for name in ("torchgfn", "torch", "numpy")}
    return {**versions, "Python": platform.python_version(), "cores": str(os.cpu_count()), "threads": "1"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns 1 where a loss does not agree, else 0."""
    parser = argparse.ArgumentParser(prog="compare-torchgfn", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare-torchgfn"), help="folder for the results")
    parser.add_argument(
        "--seeds", type=int, default=4, help="trainings of each loss with either library; 0 compares the losses only"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    agreements = compare_losses()
    print(agreement_table(agreements), flush=True)
    trainings: list[TimedTraining] = []
    if options.seeds > 0:
        say(f"seconds to the same total variation, {speed.DIMENSIONS}-D grid of side {speed.SIDE}")
        trainings = time_trainings(options.seeds)
        print(speed_table(trainings), flush=True)
        slower = [comparison.loss for comparison in speed_comparisons(trainings) if not comparison.bar_met]
        say(f"slower than torchgfn with: {', '.join(slower)}" if slower else "not slower than torchgfn with any loss")
    write(options.out, setting(), agreements, trainings)
    say(f"wrote {options.out}/comparison.md and comparison.json")
    apart = [a.ours for a in agreements if not a.agrees]
    if apart:
        say(f"FAILED: further apart than {TOLERANCE:g}: {', '.join(apart)}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
