"""Makes `.venv-torchgfn` ready: torchgfn, the CPU build of torch that `.venv` has too, and numpy < 2.

Needs nothing but Python 3.11. `make compare-torchgfn` calls it. Safe to call again: a working one is left alone.
"""

import subprocess
import sys
import time
from pathlib import Path

from set_up import ROOT, TORCH, TORCH_INDEX, SetUpError

VENV = ROOT / ".venv-torchgfn"
VENV_PYTHON = VENV / "bin" / "python"
LOG = VENV / "set-up.log"
TORCHGFN = "torchgfn==2.4.1"
# Runs in the environment: prints the versions where all of them are the wanted ones and import, fails elsewhere.
PROBE = f"""
from importlib.metadata import version
import torch, numpy, gfn.gflownet, gfn.gym
found = [f"{{name}}=={{version(name)}}" for name in ("torchgfn", "torch", "numpy")]
assert found[0] == "{TORCHGFN}" and found[1] == "{TORCH}" and int(version("numpy").split(".")[0]) < 2, found
print(", ".join(found))
"""


def say(text: str) -> None:
    """Prints a line at once, also through a pipe."""
    print(f"compare-torchgfn: {text}", flush=True)


def works() -> str | None:
    """Returns the versions in the environment, or None where it is missing or not what it has to be."""
    if not VENV_PYTHON.exists():
        return None
    probed = subprocess.run([VENV_PYTHON, "-c", PROBE], cwd=VENV, capture_output=True, text=True, timeout=300)
    return probed.stdout.strip() if probed.returncode == 0 else None


def run_or_stop(what: str, command: list[str | Path], timeout_s: float) -> None:
    """Runs a command whose output goes into the log.

    Raises:
        SetUpError: It failed or took too long; with the end of what it printed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise SetUpError(f"{what} took longer than {timeout_s:.0f} s and was stopped") from error
    printed = done.stdout + done.stderr
    if VENV.exists():
        with LOG.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n{printed}")
    if done.returncode != 0:
        raise SetUpError(f"{what} failed:\n  " + "\n  ".join(printed.splitlines()[-8:]))


def make() -> str:
    """Makes the environment from nothing and returns the versions in it.

    Raises:
        SetUpError: A step failed, or what was installed is not what was asked for.
    """
    say(f"making {VENV.name}/ with {TORCHGFN}, {TORCH} and numpy<2 (about 1 GB; details in {VENV.name}/{LOG.name})")
    run_or_stop("making the environment", [sys.executable, "-m", "venv", "--clear", VENV], 300)
    install: list[str | Path] = [VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    say(f"installing {TORCH} from pip's configured sources")
    try:
        run_or_stop("pip", [*install, TORCH], 1800)
    except SetUpError:
        say(f"not there; adding {TORCH_INDEX}")
        run_or_stop("pip", [*install, "--extra-index-url", TORCH_INDEX, TORCH], 1800)
    say(f"installing {TORCHGFN} and what it needs")
    run_or_stop("pip", [*install, TORCH, TORCHGFN, "numpy<2"], 1800)
    versions = works()
    if versions is None:
        raise SetUpError(f"{VENV.name} was made, but does not work: see {LOG}; to start afresh, remove the folder")
    return versions


def main() -> int:
    """Makes the environment where there is no working one; returns the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - started by whatever Python the user has
        print("compare-torchgfn: needs Python 3.11 or later", file=sys.stderr)
        return 2
    begun = time.monotonic()
    versions = works()
    if versions is not None:
        say(f"{VENV.name} has {versions}")
        return 0
    try:
        versions = make()
    except SetUpError as error:
        print(f"compare-torchgfn: {error}", file=sys.stderr)
        return 2
    say(f"{VENV.name} has {versions}, after {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
