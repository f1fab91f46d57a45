"""Evaluating a run's policy in this process."""

import asyncio

import pytest
from rich.console import Console

from gflowvlm.actors.sampling import SamplerUnavailableError
from gflowvlm.evaluation import run_evaluation
from gflowvlm.evaluation.metrics import EvaluationPlan
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError


class DyingSampler:
    """Stands for an engine that dies at its first request."""

    ended = False

    async def sample(self, request):
        raise SamplerUnavailableError("the engine failed")

    def shutdown(self):
        self.ended = True


class SilentSampler(DyingSampler):
    """Stands for an engine that hangs."""

    async def sample(self, request):
        await asyncio.Event().wait()


def test_an_engine_that_never_answers_is_one_line_and_is_ended(tmp_path, monkeypatch):
    sampler = SilentSampler()
    monkeypatch.setattr(run_evaluation, "make_sampler", lambda *arguments: sampler)
    limits = {"start_timeout_s": 1.0, "request_timeout_s": 1.0}
    config = RunConfig(policy={"model": str(build_tiny_policy(tmp_path / "model", seed=0))}, sampler=limits)
    run = new_run(config, tmp_path / "run").root
    plan = EvaluationPlan("id", 1, 1, 0, 1.0)
    with pytest.raises(UserError, match=r"run: no response within 2 s .* Evaluate again"):
        run_evaluation.evaluate_run(run, plan, version=0, engine=None, console=Console(quiet=True))
    assert sampler.ended


def test_an_engine_that_dies_is_one_line_and_is_ended(tmp_path, monkeypatch):
    sampler = DyingSampler()
    monkeypatch.setattr(run_evaluation, "make_sampler", lambda *arguments: sampler)
    config = RunConfig(policy={"model": str(build_tiny_policy(tmp_path / "model", seed=0))})
    run = new_run(config, tmp_path / "run").root
    plan = EvaluationPlan("id", 1, 1, 0, 1.0)
    with pytest.raises(UserError, match=r"run: the engine failed; .* Evaluate again"):
        run_evaluation.evaluate_run(run, plan, version=0, engine=None, console=Console(quiet=True))
    assert sampler.ended
