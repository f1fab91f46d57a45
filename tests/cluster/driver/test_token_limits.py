"""Trajectories that a limit of tokens cut off: counted, and said once."""

from gflowvlm.cluster.driver.token_limits import TokenLimits
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.trajectory import EndReason


def test_each_kind_is_counted_and_said_once_with_the_limit_that_is_to_be_raised():
    said = []
    limits = TokenLimits(RunConfig(), said.append)
    limits.note([EndReason.DONE, EndReason.INVALID, EndReason.STEP_LIMIT])
    assert said == []
    limits.note([EndReason.RESPONSE_CUT, EndReason.DONE, EndReason.RESPONSE_CUT])
    limits.note([EndReason.RESPONSE_CUT, EndReason.PROMPT_TOO_LONG])
    assert limits.counts == {"responses_cut": 3, "prompts_too_long": 1}
    response, prompt = said
    assert "policy.max_response_tokens (64)" in response
    assert "sampler.max_model_len (512)" in prompt
