"""Puts every family through all commands, one after the other, and writes what was seen into docs/models.md.

    python -m tests.families.matrix OUT [FAMILY ...] [--steps STEP ...] [--through COMMAND] [--again]

What was seen stands in ``OUT/FAMILY/STEP.json``, its log beside it: who calls this again goes on where it ended. The
page is written by ``--page`` alone, from what was seen.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.families.factory import FAMILIES, build_family

ROOT = Path(__file__).resolve().parents[2]
END_S = 60
STEP_S = 600
QUEUE_S = 1800
"""How long a step may take, and how much longer where it waits for its turn, seconds. Ending one takes `END_S`."""

ENGINE = ["sampler.max_model_len=1024", "sampler.kv_cache_gib=0.1", "sampler.max_num_seqs=8"]
SMALL = [
    *ENGINE,
    "policy.max_response_tokens=48",
    "rollout.group_size=2",
    "rollout.groups_per_worker=2",
    "learner.groups_per_batch=2",
    "learner.steps=2",
    "learner.warmup_steps=0",
    "evaluation.every=2",
    "evaluation.instances=2",
    "evaluation.samples=2",
    "evaluation.at_start=false",
    "cluster.dashboard=false",
    "cluster.object_store_mib=80",
]
SFT = ["--steps", "40", "--batch", "8", "--micro-batch", "8", "--lr", "3e-3", "--fresh-steps", "10"]


@dataclass(frozen=True)
class Place:
    """Where a family's things are.

    Attributes:
        folder: Everything of the family.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The instance as a hub would have it."""
        return self.folder / "model"

    @property
    def tuned(self) -> Path:
        """What `sft` made of it."""
        return self.folder / "sft"

    def run(self, engine: str) -> Path:
        """The run that an engine sampled for."""
        return self.folder / f"run-{engine}"


def gflowvlm(*arguments: str) -> list[str]:
    """Returns the command line of a gflowvlm command."""
    return [sys.executable, "-m", "gflowvlm", *arguments]


def helper(name: str, place: Place) -> list[str]:
    """Returns the command line of a step that is a function of `tests.families.matrix_steps`."""
    return [sys.executable, "-m", "tests.families.matrix_steps", name, str(place.folder)]


def training(engine: str) -> Callable[[Place], list[str]]:
    """Returns the command line of a training."""

    def command(place: Place) -> list[str]:
        model = f"policy.model={place.tuned.resolve()}"
        run = ["--run", str(place.run(engine))]
        return gflowvlm("train", *run, model, f"sampler.engine={engine}", *SMALL)

    return command


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: What stands above it.
        command: The command that must end well. One that prints a line ``RESULT ...`` shows it.
        starts: Whether it starts Ray or vLLM.
        makes: What it makes, where it refuses to go on with what an interrupted one left.
    """

    heading: str
    command: Callable[[Place], list[str]]
    starts: bool
    makes: Callable[[Place], Path] | None = None


STEPS: dict[str, Column] = {
    "sft": Column(
        "`sft`",
        lambda place: gflowvlm("sft", "--model", str(place.model.resolve()), "--out", str(place.tuned), *SFT),
        starts=False,
        makes=lambda place: place.tuned,
    ),
    "match_transformers": Column(
        "match, transformers", lambda place: helper("match_transformers", place), starts=False
    ),
    "check": Column("`check`", lambda place: gflowvlm("check", str(place.model.resolve()), *ENGINE), starts=True),
    "match_vllm": Column("match, vLLM", lambda place: helper("match_vllm", place), starts=True),
    "vllm": Column("`train`, vLLM", training("vllm"), starts=True, makes=lambda place: place.run("vllm")),
    "transformers": Column(
        "`train`, transformers", training("transformers"), starts=True, makes=lambda place: place.run("transformers")
    ),
    "eval": Column(
        "`eval`", lambda place: gflowvlm("eval", str(place.run("transformers")), "--instances", "2"), starts=True
    ),
    "serve": Column("`serve`", lambda place: helper("serve", place), starts=True),
    "peft": Column("plain PEFT", lambda place: helper("peft", place), starts=False),
}
"""The columns, in the order in which they are made."""


class Matrix:
    """What was seen, one file for each family and step.

    Args:
        out: Folder of the results.
        through: What commands that start Ray or vLLM are started through, for example a queue.
    """

    def __init__(self, out: Path, through: list[str]) -> None:
        self._out, self._through = out, through

    def seen(self, name: str, step: str) -> dict[str, Any] | None:
        """Returns what was seen of a family's step; None where it was not taken."""
        file = self._file(name, step)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def take(self, name: str, steps: Sequence[str], again: bool) -> None:
        """Takes a family's steps that were not taken, and with `again` those that failed."""
        place = Place(self._out / name)
        if not (place.model / "config.json").exists():
            build_family(name, place.model)
        for step in steps:
            seen = self.seen(name, step)
            if seen is not None and (seen["passed"] or not again):
                continue
            found = self._take(place, step, STEPS[step])
            print(f"{name} {step}: {'passed' if found['passed'] else 'FAILED'} {found['said']}", flush=True)
            self._file(name, step).write_text(json.dumps(found), encoding="utf-8")

    def _file(self, name: str, step: str) -> Path:
        return self._out / name / f"{step}.json"

    def _take(self, place: Place, step: str, column: Column) -> dict[str, Any]:
        through = self._through if column.starts else []
        if column.makes is not None:
            shutil.rmtree(column.makes(place), ignore_errors=True)
        log = place.folder / f"{step}.log"
        begun = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
        with log.open("w", encoding="utf-8") as written:
            process = subprocess.Popen(
                [*through, *column.command(place)],
                cwd=place.folder,
                env=environment,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=STEP_S + (QUEUE_S if through else 0))
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                _end(process)
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        told = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
        said = told[-1] if told else "" if code == 0 else _reason(lines)
        return {"passed": code == 0, "said": said[:600], "seconds": round(time.monotonic() - begun, 1)}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command that did not end by itself, and what it started."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _reason(lines: list[str]) -> str:
    errors = [line for line in lines if "rror" in line.split(":")[0]]
    return errors[-1] if errors else lines[-1] if lines else "no output"


def main() -> int:
    """Runs the matrix; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*", help="by default all")
    parser.add_argument("--through", type=shlex.split, default=[], help="start every command through this one")
    parser.add_argument("--again", action="store_true", help="do again what failed")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="by default all")
    parser.add_argument("--page", action="store_true", help="only write docs/models.md from what was seen")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(out, asked.through)
    if asked.page:
        from tests.families.models_page import write_page

        write_page({name: {step: matrix.seen(name, step) for step in STEPS} for name in FAMILIES})
        return 0
    for name in asked.families or FAMILIES:
        matrix.take(name, asked.steps, asked.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
