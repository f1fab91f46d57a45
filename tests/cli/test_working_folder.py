"""What the folder holds that a user stands in stays the user's: no process of a run imports from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THEIRS = ("gflowvlm", "shared", "envs", "learner", "cluster", "torch", "ray", "numpy", "random", "queue", "typing")
SHORT = (
    "learner.steps=2",
    "evaluation.instances=2",
    "evaluation.samples=2",
    "evaluation.at_start=false",
    "sampler.engine=transformers",
    "cluster.dashboard=false",
    "learner.groups_per_batch=2",
    "rollout.group_size=4",
    "rollout.groups_per_worker=2",
)


def gflowvlm(*arguments, cwd, python=("-P",), timeout_s=300):
    return subprocess.run(
        [sys.executable, *python, "-m", "gflowvlm", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.fixture
def project(tmp_path):
    """A folder with packages of its own that say so when they are imported."""
    for name in THEIRS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('imported from the working folder: {name}')")
    return tmp_path


@pytest.mark.slow
def test_a_run_in_a_folder_with_packages_of_any_name_imports_none_of_them(project):
    result = gflowvlm("train", "--run", "run", *SHORT, cwd=project)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "working folder" not in result.stdout + result.stderr
    assert (project / "run" / "summary.json").exists()


def test_python_m_does_not_import_from_there_either(project):
    # The package itself is looked for there first; that is Python's own rule.
    for name in ("gflowvlm", "typing", "random", "queue"):
        (project / name / "__init__.py").unlink()
        (project / name).rmdir()
    result = gflowvlm("presets", cwd=project, python=())
    assert result.returncode == 0, result.stderr
    assert "numberline-tiny" in result.stdout
