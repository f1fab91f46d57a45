"""Measures the learner on this machine's GPU at the shapes of real models, with random weights that are made there.

One command, from a checkout, in at most eight minutes; needs torch, transformers, PEFT and what the learner reads its
settings with, but neither Ray nor vLLM nor an installed package::

    python scripts/gpu_check.py --out gpu-check

For each shape: tokens a second of the learner's step and its share of the GPU's peak, its memory beside the memory
plan, log-probabilities in chunks against all logits at once, and a plain transformers and PEFT loop on the same batch.
Each part's figures are written when it ends (`gpu_check.json`, `gpu_check.txt`): what a limit cuts off is not lost.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {
    "torch": "torch", "transformers": "transformers", "peft": "peft", "pydantic": "pydantic", "PIL": "pillow",
    "numpy": "numpy", "yaml": "pyyaml", "pyarrow": "pyarrow",
}  # fmt: skip
"""What is imported, and the package that has it."""

LIMIT_S = 480.0
RESERVE_S = 10.0
"""Kept of the limit to write down what there is."""


class OutOfTimeError(Exception):
    """The limit has come."""


class Report:
    """The figures so far; every part that ends is written at once.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.content: dict[str, Any] = {"device": {}, "parts": []}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> list[str]:
        """Parts without figures."""
        return [f"{part['shape']} {part['part']}" for part in self.content["parts"] if "why_not" in part]

    def add(self, shape: str, name: str, figures: dict[str, Any]) -> None:
        """Takes a part's figures, or ``why_not`` for one that has none, and writes everything."""
        self.content["parts"].append({"shape": shape, "part": name, **figures})
        partial = self._folder / "gpu_check.json.partial"
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._folder / "gpu_check.json")
        (self._folder / "gpu_check.txt").write_text(self.table(), encoding="utf-8")
        print(_line(self.content["parts"][-1]), flush=True)

    def table(self) -> str:
        """Returns all figures as lines of text."""
        head = ", ".join(f"{name} {_short(value)}" for name, value in self.content["device"].items())
        return "\n".join([head, *(_line(part) for part in self.content["parts"])]) + "\n"


def _line(part: dict[str, Any]) -> str:
    figures = (f"{name} {_short(value)}" for name, value in part.items() if name not in ("shape", "part"))
    return f"{part['shape']:5} {part['part']:12} " + ", ".join(figures)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Runs the check; returns 0 if every part has figures, 1 if not, 2 if nothing could be run."""
    options = _options()
    missing = sorted(package for module, package in NEEDED.items() if find_spec(module) is None)
    if missing:
        print(f"gpu_check: not installed here: {', '.join(missing)} (pip install {' '.join(missing)})")
        return 2
    sys.path.insert(0, str(ROOT))
    started = time.monotonic()
    import torch
    from gpu_parts import Clock, check_shape, describe
    from gpu_shapes import SHAPES

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and set(options.shapes) != {"tiny"}:
        print("gpu_check: torch sees no GPU here; --shapes tiny runs on a CPU")
        return 2
    limit_s = options.limit_s - RESERVE_S
    report = Report(Path(options.out))
    try:
        with _alarm(started + limit_s - time.monotonic()):
            found = describe(device)
            report.content["device"] = found
            clock = Clock(device, started + limit_s)
            rate = found["sheet_tflops"] or found["product_tflops"]
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
                for name in options.shapes:
                    check_shape(SHAPES[name], clock, rate, options.checkpointing, Path(folder), report.add)
    except OutOfTimeError:
        report.add("all", "limit", {"why_not": f"the limit of {options.limit_s:.0f} s came first"})
    print(f"{time.monotonic() - started:.0f} s; figures: {options.out}")
    for name in report.failed:
        print(f"without figures: {name}")
    return 1 if report.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="3b,7b", type=lambda text: text.split(","), help="3b, 7b, tiny")
    parser.add_argument("--out", default="gpu-check", help="folder of gpu_check.json and gpu_check.txt")
    parser.add_argument("--limit-s", default=LIMIT_S, type=float, help="longest that all of it may take")
    parser.add_argument("--device", default=None, help="cuda or cpu; by default the GPU where there is one")
    parser.add_argument("--checkpointing", action="store_true", help="with policy.gradient_checkpointing")
    options = parser.parse_args()
    known = ("3b", "7b", "tiny")
    if not set(options.shapes) <= set(known):
        parser.error(f"--shapes: choose from {', '.join(known)}")
    return options


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
