"""The check of sampler against learner: several responses, by their mean and by a high quantile."""

import math
import time
from dataclasses import replace

import pytest

from gflowvlm.actors.sampling import PromptTooLongError, SampleResponse
from gflowvlm.evaluation.sampler_check import (
    INSTANCES,
    SAMPLES,
    agreement_line,
    mismatch_row,
    require_agreement,
    sampled_responses,
)
from gflowvlm.learner.mismatch import compare
from gflowvlm.learner.tiny_policy import build_processor
from gflowvlm.shared.config import EvaluationSettings, RolloutSettings, RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import BASE_VERSION
from tests.actors.misbehaving import FIRST, RELEASE, SEEDS, MisbehavingSettings
from tests.actors.scripted import Fixed


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_processor().save_pretrained(folder)
    return str(folder)


def mismatch(model_path, differences, tokens=1000):
    """A check in which the first tokens differ by so much."""
    response = SampleResponse(list(range(tokens)), [-1.0] * tokens, "", 0)
    (one, *_) = sampled_responses(RunConfig(), PolicyInputs.load(model_path), Fixed(model_path))
    one = replace(
        one, steps=[replace(one.steps[0], response_ids=response.token_ids, sampler_log_probs=[-1.0] * tokens)]
    )
    scores = [-1.0 - d for d in differences] + [-1.0] * (tokens - len(differences))
    return compare([one], [[scores]])


def test_several_responses_of_several_instances_by_the_base_model_are_compared(model_path):
    source = Fixed(model_path)
    found = sampled_responses(RunConfig(), PolicyInputs.load(model_path), source)
    assert len(found) == INSTANCES * SAMPLES == len({t.trajectory_id for t in found})
    assert len({t.instance_id for t in found}) == INSTANCES
    assert {r.version for r in source.requests} == {BASE_VERSION}
    row = mismatch_row(compare(found, [[step.sampler_log_probs for step in t.steps] for t in found]))
    assert (row["mean"], row["quantile_99"], row["max"], row["responses"]) == (0, 0, 0, 16)
    assert agreement_line(row).endswith(f"on {row['tokens']} tokens of 16 responses")


BF16 = RunConfig.model_validate({"policy": {"dtype": "bfloat16"}})
NF4 = RunConfig.model_validate({"policy": {"dtype": "bfloat16", "load_in": "4bit"}})
AS_SET = RunConfig.model_validate({"sampler": {"mismatch_tolerance": 0.5, "mismatch_mean_tolerance": 0.1}})


@pytest.mark.parametrize(
    ("config", "differences", "agrees"),
    [
        # What bfloat16 engines show: a few unlikely tokens far apart, the others hardly.
        (BF16, [0.4] * 9 + [0.05] * 100, True),
        # More than one token in a hundred.
        (BF16, [0.4] * 11, False),
        # All a little: other weights.
        (BF16, [0.03] * 1000, False),
        (BF16, [math.nan], False),
        (RunConfig(), [2e-6] * 1000, True),
        (RunConfig(), [2e-4] * 11, False),
        (RunConfig(), [3e-5] * 1000, False),
        # The learner's weights in four bits.
        (NF4, [0.3] * 1000, True),
        (NF4, [0.6] * 1000, False),
        (AS_SET, [0.4] * 100, True),
        (AS_SET, [0.6] * 100, False),
    ],
)
def test_mean_and_quantile_decide_by_the_precision_or_as_set(model_path, config, differences, agrees):
    found = mismatch(model_path, differences)
    if agrees:
        require_agreement(found, config, model_path)
        return
    with pytest.raises(UserError, match=r"in the mean \(sampler\.mismatch_mean_tolerance is .* at the 99% quantile"):
        require_agreement(found, config, model_path)


@pytest.mark.parametrize(
    ("engine", "told"), [("vllm", "see each other in this model"), ("transformers", "check policy")]
)
def test_attention_that_vllm_lacks_on_a_cpu_is_named(model_path, monkeypatch, engine, told):
    monkeypatch.setattr(PolicyInputs, "has_token_types", True)
    config = RunConfig.model_validate({"sampler": {"engine": engine}})
    with pytest.raises(UserError, match=told):
        require_agreement(mismatch(model_path, [0.05] * 20), config, model_path)


def misbehaving(first, **rollout):
    return RunConfig(
        task=MisbehavingSettings(), evaluation=EvaluationSettings(seed=first), rollout=RolloutSettings(**rollout)
    )


def test_instances_that_fail_are_left_out(model_path):
    # The first half does nothing wrong.
    found = sampled_responses(misbehaving(FIRST - 4), PolicyInputs.load(model_path), Fixed(model_path))
    assert [t.instance_seed for t in found] == [FIRST - 4 + i // SAMPLES for i in range(4 * SAMPLES)]


def test_where_no_instance_can_be_answered_the_reason_is_said(model_path):
    error = PromptTooLongError.of(600, 512)
    with pytest.raises(UserError, match=r"no instance could be answered: a prompt of 600 tokens"):
        sampled_responses(RunConfig(), PolicyInputs.load(model_path), Fixed(model_path, error=error))


def test_an_instance_that_never_returns_ends_the_check_by_name(model_path):
    first = SEEDS["a call without end"]
    try:
        with pytest.raises(UserError, match=rf"^numberline/id/{first} .*did not return in 1 s"):
            sampled_responses(
                misbehaving(first, environment_timeout_s=1.0), PolicyInputs.load(model_path), Fixed(model_path)
            )
    finally:
        RELEASE.set()
        time.sleep(0.2)
        RELEASE.clear()
