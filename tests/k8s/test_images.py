"""The Dockerfiles, checked as far as that goes without building them."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gflowvlm.cluster.launch.process_environment import PROCESS_ENVIRONMENT
from tests.k8s.manifests import K8S, ROOT, tool

DOCKER = K8S / "docker"
KINDS = ("cpu", "gpu")


def instructions(kind: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined, comments left out."""
    text = (DOCKER / f"{kind}.Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]


def copied(kind: str) -> list[str]:
    """What the Dockerfile copies out of the project."""
    arguments = [rest.split() for name, rest in instructions(kind) if name == "COPY" and "--from" not in rest]
    return [source for words in arguments for source in [w for w in words if not w.startswith("--")][:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_hadolint_finds_nothing(kind: str) -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKER / f"{kind}.Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_copied_is_in_the_tree_and_let_through(kind: str) -> None:
    rules = (DOCKER / f"{kind}.Dockerfile.dockerignore").read_text().splitlines()
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[1] == "*"
    assert set(copied(kind)) == let_through
    assert all((ROOT / source).exists() for source in let_through)
    assert all(fnmatch.fnmatch("/shared/__pycache__", rule.replace("**", "*")) for rule in rules[-1:])


@pytest.mark.parametrize("kind", KINDS)
def test_set_up_finds_every_file_it_needs_and_makes_this_engine(kind: str) -> None:
    runs = [rest for name, rest in instructions(kind) if name == "RUN"]
    (set_up,) = [rest for rest in runs if "scripts/set_up.py" in rest]
    assert set_up.endswith(f"python3.11 scripts/set_up.py --engine {kind}")
    needed = {"pyproject.toml", "constraints.txt", "scripts", "README.md", "LICENSE"}
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert set(copied(kind)) == needed | packages | {"k8s/docker/train-or-resume"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_holds_the_whole_package_its_links_included(kind: str, tmp_path: Path) -> None:
    """Does what `COPY` does: links inside of a folder stay links, and lead to where the image has their targets."""
    for source in copied(kind):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, symlinks=True)
    command = [sys.executable, "-m", "gflowvlm", "presets"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "numberline-tiny" in done.stdout, done.stderr
    assert {path.resolve().parent for path in (tmp_path / "gflowvlm").iterdir() if path.is_symlink()} == {tmp_path}


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_runs_as_an_ordinary_user_with_the_environment_that_ray_needs(kind: str) -> None:
    last_stage = instructions(kind)[[name for name, _ in instructions(kind)].index("FROM", 1) :]
    environment = dict(pair.split("=", 1) for name, rest in last_stage if name == "ENV" for pair in rest.split())
    assert PROCESS_ENVIRONMENT.items() <= environment.items()
    assert environment["PATH"].startswith("/app/.venv/bin:")
    assert [rest for name, rest in last_stage if name == "USER"] == ["1000:1000"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_can_compile_what_the_engines_compile_on_the_node(kind: str) -> None:
    last_stage = instructions(kind)[[name for name, _ in instructions(kind)].index("FROM", 1) :]
    (packages,) = [rest.split() for name, rest in last_stage if name == "RUN" and "apt-get install" in rest]
    assert {"g++", "python3.11-dev"} <= set(packages)


@pytest.fixture
def recorder(tmp_path: Path) -> dict[str, str]:
    """An environment in which `gflowvlm` says what it was called with."""
    program = tmp_path / "bin" / "gflowvlm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}


def train_or_resume(environment: dict[str, str], *arguments: str) -> str:
    """Runs the image's entry point; returns what it printed."""
    command = ["sh", str(DOCKER / "train-or-resume"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30).stdout


def test_the_same_command_starts_resumes_and_leaves_an_ended_run_alone(
    tmp_path: Path, recorder: dict[str, str]
) -> None:
    run = tmp_path / "a run"
    arguments = (str(run), "--preset", "numberline-7b", "policy.model=/runs/my model")
    assert train_or_resume(recorder, *arguments) == f"train|--run|{'|'.join(arguments)}|"
    run.mkdir()
    (run / "config.yaml").touch()
    assert train_or_resume(recorder, *arguments) == f"train|--resume|{run}|"
    (run / "summary.json").touch()
    assert "has ended" in train_or_resume(recorder, *arguments)
