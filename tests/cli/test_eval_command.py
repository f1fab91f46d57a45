"""`gflowvlm eval` on a run's base model, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig

ROOT = Path(__file__).parents[2]


def evaluate(run, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "gflowvlm.cli.main", "eval", str(run), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def make_run(tmp_path):
    model = build_tiny_policy(tmp_path / "model", seed=0)

    def make(max_steps):
        config = RunConfig(policy={"model": str(model)}, task={"max_steps": max_steps}, sampler={"max_model_len": 900})
        return new_run(config, tmp_path / "run").root

    return make


SMALL = ("--version", 0, "--engine", "transformers", "--instances", 1, "--samples", 1, "--exact")


def test_exact_figures_of_every_action_sequence_stand_beside_the_sampled_ones(make_run, tmp_path):
    result = evaluate(make_run(2), *SMALL, "--exact-instances", 1, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["instances"] == figures["samples"] == 1
    base, version = figures["exact"]["base"], figures["exact"]["version"]
    assert base == version
    assert base["states"] == 1 + 2 + 4
    # Random weights say nothing that the demonstrations say.
    assert base["uncovered"] == pytest.approx(1.0)
    assert base["total_variation"] == pytest.approx(1.0)


def test_a_tree_that_is_too_large_is_said_so_with_the_sampled_interval(make_run):
    result = evaluate(make_run(20), *SMALL)
    assert result.returncode == 0, result.stderr
    assert "too large" in result.stdout
    assert "95 % interval" in result.stdout
