"""Families through vLLM's engine: the prompt's tokens, the match of both sides, tokens that are never sampled."""

import asyncio

import pytest

from gflowvlm.actors.samplers import make_sampler
from gflowvlm.actors.sampling import SampleRequest
from gflowvlm.actors.vllm_arguments import MOST_BIASES
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.families.agreement import difference, lively_policy, requests, sampling

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4

# Qwen3-VL: positions of several axes, bounded pictures, and more forbidden tokens than there may be biases.
# LLaVA 1.6: a beginning of the text that no template writes.
CHANGES = {
    "qwen3_vl": {"max_pixels": 4 * 32 * 32, "min_pixels": 32 * 32, "system_prompt": "Be brief."},
    "llava_next": {"lora_targets": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_vllm_plays_what_the_learner_scores(name, family_folder, tmp_path):
    folder = str(family_folder(name))
    whole = sampling("vllm").model_dump()
    config = RunConfig.model_validate({**whole, "policy": {**whole["policy"], **CHANGES[name]}})
    policy = lively_policy(config, family_folder(name))
    policy.save_pretrained(tmp_path)
    inputs = PolicyInputs.load(folder, prompts=config.policy)
    assert (len(inputs.forbidden_ids) > MOST_BIASES) == (name == "qwen3_vl")
    sampler = make_sampler(config, folder, "vllm")

    async def body() -> None:
        await sampler.load(1, tmp_path)
        for asked in requests(0)[::2]:
            expected = inputs.encode([asked.prompt], [asked.image])["input_ids"][0].tolist()
            assert await sampler.prompt_ids(asked) == expected
        assert await difference(sampler, policy, inputs, 0) <= TOLERANCE
        assert await difference(sampler, policy, inputs, 1) <= TOLERANCE
        # Flat distributions: every second token would be one that is none.
        flat = [SampleRequest("a", asked.image, 24, 2.0, 0, seed) for seed, asked in enumerate(requests(0))]
        answers = await asyncio.gather(*(sampler.sample(one) for one in flat))
        sampled = {token for answer in answers for token in answer.token_ids}
        assert len(sampled) > 50
        assert sampled.isdisjoint(inputs.forbidden_ids)

    try:
        asyncio.run(body())
    finally:
        sampler.shutdown()
