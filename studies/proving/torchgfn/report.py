"""What the comparison found, as JSON and as a Markdown page. Nothing of torchgfn is needed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

TOLERANCE = 1e-6
"""Losses and gradients agree up to this, relative where their size is above 1."""

THRESHOLD = 0.05
"""Total variation that a training has to reach."""


@dataclass(frozen=True)
class Agreement:
    """How far apart one of our losses is from torchgfn's.

    Attributes:
        ours: What of ours.
        theirs: What of torchgfn's.
        in_loss: Largest difference of the values.
        in_gradient: Largest difference of the gradients; None where there is none.
    """

    ours: str
    theirs: str
    in_loss: float
    in_gradient: float | None

    @property
    def agrees(self) -> bool:
        """Whether both differences are within the tolerance; NaN is not."""
        return self.in_loss <= TOLERANCE and (self.in_gradient is None or self.in_gradient <= TOLERANCE)


Curve = list[tuple[int, float, float]]
"""Trajectories sampled, seconds spent and total variation, at each measurement of a training."""


@dataclass(frozen=True)
class TimedTraining:
    """One training with our code or with torchgfn.

    Attributes:
        loss: Our loss's name.
        counterpart: torchgfn's.
        library: "ours" or "torchgfn".
        seed: Of weights and sampling.
        seconds: Spent on sampling and learning up to the first measurement with a total variation of at most
            `THRESHOLD`; None where there was none.
        trajectories: Sampled up to there.
        total_seconds: Spent on the whole training.
        total_trajectories: Sampled in the whole training.
        total_variation: At its end.
    """

    loss: str
    counterpart: str
    library: str
    seed: int
    seconds: float | None
    trajectories: int | None
    total_seconds: float
    total_trajectories: int
    total_variation: float


@dataclass(frozen=True)
class SpeedComparison:
    """All trainings with one loss, seeds 0, 1, ….

    Attributes:
        loss: Our loss's name.
        counterpart: torchgfn's.
        ours: Our trainings.
        torchgfn: Torchgfn's trainings.
    """

    loss: str
    counterpart: str
    ours: list[TimedTraining]
    torchgfn: list[TimedTraining]

    @property
    def ratio(self) -> float | None:
        """Our mean seconds to the threshold over torchgfn's; None where not every training reached it."""
        ours, theirs = seconds_to_threshold(self.ours), seconds_to_threshold(self.torchgfn)
        return mean(ours) / mean(theirs) if len(ours) == len(self.ours) and len(theirs) == len(self.torchgfn) else None

    @property
    def bar_met(self) -> bool:
        """Whether we are not slower: each of our trainings got there, and the ratio is at most 1.

        Where torchgfn did not get there with every seed, the time of its whole training counts for those seeds:
        it is less than it would have needed.
        """
        ours = seconds_to_threshold(self.ours)
        theirs = [
            training.total_seconds if training.seconds is None else training.seconds for training in self.torchgfn
        ]
        return len(ours) == len(self.ours) and mean(ours) <= mean(theirs)


def from_curve(loss: str, counterpart: str, library: str, seed: int, curve: Curve) -> TimedTraining:
    """Returns a training as timed, from its curve."""
    there = next(((count, seconds) for count, seconds, distance in curve if distance <= THRESHOLD), (None, None))
    total_trajectories, total_seconds, total_variation = curve[-1]
    return TimedTraining(
        loss=loss,
        counterpart=counterpart,
        library=library,
        seed=seed,
        seconds=there[1],
        trajectories=there[0],
        total_seconds=total_seconds,
        total_trajectories=total_trajectories,
        total_variation=total_variation,
    )


def seconds_to_threshold(trainings: Sequence[TimedTraining]) -> list[float]:
    """Returns the seconds of the trainings that got there."""
    return [training.seconds for training in trainings if training.seconds is not None]


def speed_comparisons(trainings: Sequence[TimedTraining]) -> list[SpeedComparison]:
    """Returns the trainings by loss, in the order in which the losses first appear."""
    named = {(training.loss, training.counterpart): None for training in trainings}
    return [
        SpeedComparison(
            loss,
            counterpart,
            [training for training in trainings if training.loss == loss and training.library == "ours"],
            [training for training in trainings if training.loss == loss and training.library == "torchgfn"],
        )
        for loss, counterpart in named
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """Returns mean ± standard deviation; "–" of nothing."""
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def agreement_table(agreements: Sequence[Agreement]) -> str:
    """Returns the Markdown table of all comparisons."""
    head = ("ours", "torchgfn", "largest difference", "of gradients", f"≤ {TOLERANCE:g}")
    return table(
        head,
        [
            (
                f"`{a.ours}`",
                f"`{a.theirs}`",
                f"{a.in_loss:.1e}",
                "–" if a.in_gradient is None else f"{a.in_gradient:.1e}",
                "yes" if a.agrees else "**NO**",
            )
            for a in agreements
        ],
    )


def speed_table(trainings: Sequence[TimedTraining]) -> str:
    """Returns the Markdown table of all speed_comparisons."""
    head = (
        "ours",
        "torchgfn",
        f"seconds to TV ≤ {THRESHOLD:g}, ours",
        "torchgfn's",
        "ratio",
        "trajectories to it, ours",
        "torchgfn's",
        "ms a trajectory, ours",
        "torchgfn's",
        "not above torchgfn's",
    )
    rows = []
    for comparison in speed_comparisons(trainings):
        sides = (comparison.ours, comparison.torchgfn)
        to_threshold = [f"{spread(seconds_to_threshold(side), 2)}{not_there(side)}" for side in sides]
        trajectories = [spread([r.trajectories for r in side if r.trajectories is not None], 0) for side in sides]
        steps = [spread([1000 * r.total_seconds / r.total_trajectories for r in side], 2) for side in sides]
        ratio = "–" if comparison.ratio is None else f"{comparison.ratio:.2f}"
        met = "yes" if comparison.bar_met else "**NO**"
        rows.append(
            (f"`{comparison.loss}`", f"`{comparison.counterpart}`", *to_threshold, ratio, *trajectories, *steps, met)
        )
    return table(head, rows)


def not_there(trainings: Sequence[TimedTraining]) -> str:
    """Returns how many trainings did not reach the threshold, to stand behind a mean; nothing where all did."""
    missing = sum(training.seconds is None for training in trainings)
    return f" ({missing} of {len(trainings)} never)" if missing else ""


def write(
    folder: Path, setting: dict[str, str], agreements: Sequence[Agreement], trainings: Sequence[TimedTraining]
) -> None:
    """Writes `comparison.json` and `comparison.md`.

    Args:
        folder: Made where it is missing.
        setting: What it ran on, by name.
        agreements: What the comparison of the losses found.
        trainings: All trainings; empty where only the losses were compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "setting": setting,
        "tolerance": TOLERANCE,
        "threshold": THRESHOLD,
        "agreement": [{**asdict(a), "agrees": a.agrees} for a in agreements],
        "trainings": [asdict(training) for training in trainings],
        "comparisons": [{"loss": d.loss, "ratio": d.ratio, "bar_met": d.bar_met} for d in speed_comparisons(trainings)],
    }
    (folder / "comparison.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    parts = [", ".join(f"{name} {value}" for name, value in setting.items()), agreement_table(agreements)]
    if trainings:
        parts.append(speed_table(trainings))
    (folder / "comparison.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
