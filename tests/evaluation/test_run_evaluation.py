"""Evaluating a run's policy in this process."""

import asyncio
import io
import sys

import pytest
from rich.console import Console

from gflowvlm.actors.sampling import SampleResponse, SamplerUnavailableError, UnknownVersionError
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.evaluation import run_evaluation
from gflowvlm.evaluation.metrics import EvaluationPlan
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs


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


class TalkingSampler(DyingSampler):
    """Answers, always the same."""

    def __init__(self, inputs):
        self.inputs = inputs

    async def sample(self, request):
        text = '{"thoughts": "on", "action": "+"}'
        ids = self.inputs.encode_response(text)
        return SampleResponse(ids, [-0.5] * len(ids), text, 0)


@pytest.mark.parametrize("bad", [range(2), range(100)])
def test_instances_whose_environment_fails_are_named_and_left_out(tmp_path, monkeypatch, bad):
    model = str(build_tiny_policy(tmp_path / "model", seed=0))
    monkeypatch.setattr(run_evaluation, "make_sampler", lambda *arguments: TalkingSampler(PolicyInputs.load(model)))
    run = new_run(RunConfig(policy={"model": model}), tmp_path / "run").root
    start = NumberLineEnv._start

    def exit_at_some(env, rng):
        if env.instance_seed in bad:
            sys.exit(3)
        start(env, rng)

    monkeypatch.setattr(NumberLineEnv, "_start", exit_at_some)
    plan, out = EvaluationPlan("id", 5, 1, 0, 1.0), io.StringIO()

    def evaluate():
        console = Console(file=out, width=200)
        return run_evaluation.evaluate_run(run, plan, version=0, engine=None, console=console)

    if len(bad) > 5:
        with pytest.raises(UserError, match="none of the 5 instances could be played"):
            evaluate()
    else:
        # The exact target's bound is computed on the instances that were played.
        assert evaluate()["instances"] == 3
    assert "left out: numberline/id/1: SystemExit: 3" in out.getvalue()


@pytest.mark.parametrize(("asked", "seen", "given"), [(0.0, True, 0.0), (1.0, True, 1.0), (1.0, False, 0.0)])
def test_a_run_is_evaluated_where_its_samplers_computed_if_the_machine_can(tmp_path, monkeypatch, asked, seen, given):
    started = []

    def start(config, model, engine):
        started.append(config.sampler.gpus_per_replica)
        return DyingSampler()

    model = str(build_tiny_policy(tmp_path / "model", seed=0))
    config = RunConfig(policy={"model": model}, sampler={"gpus_per_replica": asked})
    run = new_run(config, tmp_path / "run").root
    monkeypatch.setattr(run_evaluation, "make_sampler", start)
    monkeypatch.setattr(run_evaluation.torch.cuda, "is_available", lambda: seen)
    with pytest.raises(UserError, match="the engine failed"):
        run_evaluation.evaluate_run(
            run, EvaluationPlan("id", 1, 1, 0, 1.0), version=0, engine=None, console=Console(quiet=True)
        )
    assert started == [given]


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (2, r"adapter version 2 was removed \(learner\.keep_adapters\); there are 1, 4-6$"),
        (9, r"adapter version 9 was never published; there are 1, 4-6$"),
    ],
)
def test_a_version_that_is_not_there_is_one_line_that_says_which_there_are(tmp_path, version, problem):
    folder = new_run(RunConfig(policy={"model": str(tmp_path)}), tmp_path / "run")
    for there in (1, 4, 5, 6):
        folder.adapter(there).mkdir()
    with pytest.raises(UserError, match=problem):
        run_evaluation.evaluate_run(
            folder.root, EvaluationPlan("id", 1, 1, 0, 1.0), version=version, engine=None, console=Console(quiet=True)
        )


class LoadingSampler(TalkingSampler):
    """Loads adapters; one is removed by the run while it is loaded."""

    def __init__(self, inputs, removed=None):
        super().__init__(inputs)
        self.removed = removed

    async def load(self, version, path):
        if version == self.removed:
            raise UnknownVersionError(f"{path}: adapter version {version} was removed while it was loaded")
        assert path.is_dir()


def run_that_goes_on(tmp_path, monkeypatch, removed_at_load=None):
    """A run whose store removes versions 1 and 2 and publishes 3 while the engine of an evaluation starts."""
    model = str(build_tiny_policy(tmp_path / "model", seed=0))
    folder = new_run(RunConfig(policy={"model": model}), tmp_path / "run")
    for version in (1, 2):
        folder.adapter(version).mkdir()

    def start(*arguments):
        for version in (1, 2):
            folder.adapter(version).rmdir()
        folder.adapter(3).mkdir()
        return LoadingSampler(PolicyInputs.load(model), removed_at_load)

    monkeypatch.setattr(run_evaluation, "make_sampler", start)
    return folder.root


def test_the_newest_adapter_of_a_run_that_goes_on_is_chosen_once_the_engine_has_started(tmp_path, monkeypatch):
    run, plan = run_that_goes_on(tmp_path, monkeypatch), EvaluationPlan("id", 1, 1, 0, 1.0)
    figures = run_evaluation.evaluate_run(run, plan, version=None, engine=None, console=Console(quiet=True))
    assert figures["version"] == 3


@pytest.mark.parametrize(("version", "removed_at_load"), [(2, None), (None, 3)])
def test_a_version_that_a_run_removes_before_it_is_loaded_is_one_line(tmp_path, monkeypatch, version, removed_at_load):
    run, plan = run_that_goes_on(tmp_path, monkeypatch, removed_at_load), EvaluationPlan("id", 1, 1, 0, 1.0)
    with pytest.raises(UserError, match=r"adapter version \d was removed"):
        run_evaluation.evaluate_run(run, plan, version=version, engine=None, console=Console(quiet=True))
