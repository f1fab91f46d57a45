"""What came of it, as tables and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chaos.proof import Check
from chaos.records import Records


@dataclass(frozen=True)
class Recovery:
    """A kill, and how the run went on.

    Attributes:
        number: Number of the kill.
        step: Newest learner step when it came.
        part: What was killed.
        seconds: Until the next learner step was logged; None where none followed.
    """

    number: int
    step: int
    part: str
    seconds: float | None


def recoveries(records: Records) -> list[Recovery]:
    """Returns every kill with the time to the next learner step."""
    times = [float(row["time"]) for row in records.rows_of("step")]
    return [
        Recovery(
            kill["number"],
            kill["step"],
            kill["part"],
            next((time - kill["time"] for time in times if time > kill["time"]), None),
        )
        for kill in records.kills
    ]


def slowdown(disturbed: Records, undisturbed: Records) -> dict[str, float]:
    """Returns how many times as long the disturbed run took: ``learning`` and ``wall``, each where both are known."""
    pairs = {
        "learning": (disturbed.learning_s, undisturbed.learning_s),
        "wall": (wall_s(disturbed), wall_s(undisturbed)),
    }
    return {name: ours / theirs for name, (ours, theirs) in pairs.items() if ours is not None and theirs is not None}


def wall_s(records: Records) -> float | None:
    """Returns the seconds from the driver's start to its final report; None before that."""
    return None if records.summary is None else float(records.summary["wall_s"])


def as_json(
    setting: Mapping[str, Any], checks: Sequence[Check], records: Records, other: Records | None
) -> dict[str, Any]:
    """Returns everything that was found.

    Args:
        setting: What was asked for.
        checks: What was checked.
        records: Of the disturbed run.
        other: Of the undisturbed one, where there is one.
    """
    runs = {"disturbed": records} | ({} if other is None else {"undisturbed": other})
    return {
        "setting": dict(setting),
        "holds": all(check.holds for check in checks),
        "checks": [{**asdict(check), "holds": check.holds} for check in checks],
        "kills": [asdict(recovery) for recovery in recoveries(records)],
        "runs": {
            name: {
                "learning_s": run.learning_s,
                "wall_s": wall_s(run),
                "trajectories": len(run.written),
                "success": {split: row["success"] for split, row in run.final.items()},
            }
            for name, run in runs.items()
        },
        "times_as_long": {} if other is None else slowdown(records, other),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """Returns the Markdown tables of what `as_json` returns."""
    setting = ", ".join(f"{name} {value}" for name, value in found["setting"].items())
    checks = [
        (c["name"], c["seen"], "yes" if c["holds"] else f"**NO**: {'; '.join(c['problems'])}") for c in found["checks"]
    ]
    kills = [(k["number"], k["step"], k["part"], _seconds(k["seconds"])) for k in found["kills"]]
    runs = [
        (
            name,
            _seconds(run["learning_s"]),
            _seconds(run["wall_s"]),
            run["trajectories"],
            ", ".join(f"{split} {success:.2f}" for split, success in run["success"].items()) or "–",
        )
        for name, run in found["runs"].items()
    ]
    parts = [
        setting,
        _table(("what must hold", "seen", "holds"), checks),
        _table(("kill", "after step", "of", "seconds to the next step"), kills),
        _table(("run", "learning, seconds", "whole, seconds", "trajectories", "final success"), runs),
    ]
    if found["times_as_long"]:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["times_as_long"].items())
        parts.append(f"times as long as undisturbed: {ratios}")
    return "\n\n".join(parts)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
