"""Building this project's distributions from a copy of its tree, and running commands away from it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gflowvlm"
ROOMS = tuple(sorted(path.name for path in (ROOT / PACKAGE).iterdir() if path.is_symlink()))
"""The top-level folders that the package links."""

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def run_in(cwd: Path, *command: str, **environment: str) -> str:
    """Runs a command in a folder; returns what it printed, and fails the test with it where the command fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


def copy_tree(target: Path) -> None:
    """Copies what a distribution is built from, with its links, so that building leaves nothing in the tree."""
    for folder in (PACKAGE, *ROOMS):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)


def build_wheel(source: Path, target: Path) -> Path:
    """Builds the wheel of a source tree into a folder that holds no other; returns its path."""
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run_in(target, *PIP, "wheel", *offline, "--wheel-dir", str(target), str(source))
    (built,) = target.glob("*.whl")
    return built


def build_editable(source: Path, target: Path) -> Path:
    """Builds what `pip install -e` installs of a tree, into a folder that holds no other; returns its path."""
    code = f"from setuptools.build_meta import build_editable; build_editable({str(target)!r})"
    run_in(source, sys.executable, "-c", code)
    (built,) = target.glob("*.whl")
    return built


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """Makes a virtual environment with a wheel in it; what the wheel needs comes from the tests' own environment.

    Returns:
        The environment's folder of packages.
    """
    run_in(folder.parent, sys.executable, "-m", "venv", "--without-pip", str(folder))
    install = ("install", "--no-deps", "--no-index", str(wheel))
    run_in(folder, *PIP, "--python", str(folder / "bin" / "python"), *install)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder that is named in a .pth file has its own .pth files left alone, so its editable install stays out.
    (packages / "dependencies.pth").write_text(f"{Path(str(setuptools.__file__)).parents[1]}\n")
    return packages


def build_sdist(source: Path, target: Path) -> Path:
    """Builds the source distribution of a tree into a folder that holds no other; returns its path."""
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(target)!r})"
    run_in(source, sys.executable, "-c", code)
    (built,) = target.glob("*.tar.gz")
    return built
