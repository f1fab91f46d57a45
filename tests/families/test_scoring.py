"""The learner's log-probabilities on the real classes: shared prompts, positions, token types, heads."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, GemmaConfig, PaliGemmaForConditionalGeneration

from gflowvlm.learner.model import load_base_model
from gflowvlm.learner.packing import Packer, ScoredStep
from gflowvlm.learner.scoring import Scorer
from gflowvlm.learner.sft import SftExample, sft_loss
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.families.agreement import CPU, PROMPTS, SIZES, picture
from tests.families.factory import FAMILIES

SHARED = {
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "glm4v",
    "mistral3",
}
"""Families whose language model keeps the keys of all tokens, so that prompts can be passed once."""


@pytest.fixture(params=FAMILIES)
def family(request, family_folder):
    folder = family_folder(request.param)
    return request.param, load_base_model(str(folder), "float32").eval(), PolicyInputs.load(str(folder))


def responses(inputs):
    """Responses to three states of two picture sizes and lengths of prompt, two or three for each."""
    states = [(PROMPTS[0], SIZES[0]), (PROMPTS[1], SIZES[1]), (PROMPTS[0], SIZES[1])]
    texts = ["go up", "3 is below 5, so go up", "no, down it is"]
    steps = []
    for number, (prompt, size) in enumerate(states):
        for text in texts[: 2 + number % 2]:
            ids = inputs.tokenizer.encode(text, add_special_tokens=False)
            stop = inputs.tokenizer.encode("stop here", add_special_tokens=False)
            steps.append(ScoredStep(prompt, picture(number, size), ids, len(ids) - 2, len(ids), stop))
    return steps


def alone(model, inputs, step, response_type):
    """Brute force: one unpadded sequence, positions left to the model, all logits; (R,) log-probabilities."""
    encoded = dict(inputs.encode([step.prompt], [step.image]))
    prompt, response = encoded["input_ids"].shape[1], torch.tensor([step.response_ids])
    encoded["input_ids"] = torch.cat([encoded["input_ids"], response], dim=1)
    encoded["attention_mask"] = torch.ones_like(encoded["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in encoded:
            encoded[name] = torch.cat([encoded[name], torch.full_like(response, response_type)], dim=1)
    with torch.no_grad():
        logits = model(**encoded, use_cache=False).logits[0, prompt - 1 : -1]
    return logits.log_softmax(dim=-1)[torch.arange(response.shape[1]), response[0]]


@pytest.mark.parametrize("shared", [True, False])
def test_scores_are_those_of_every_sequence_alone(family, shared):
    name, model, inputs = family
    if shared and name not in SHARED:
        assert not Scorer(model, inputs, CPU, 1000).pack(responses(inputs)[:2])[0].is_shared
        return
    assert_scored_as_alone(model, inputs, shared, response_type=1 if name.startswith("paligemma") else 0)


def assert_scored_as_alone(model, inputs, shared, response_type):
    scorer = Scorer(model, inputs, CPU, token_budget=100_000)
    assert scorer._head.in_chunks
    if not shared:
        scorer._packer = Packer(inputs, 100_000, shares_prompts=False)
    (batch,) = scorer.pack(responses(inputs))
    assert batch.is_shared == shared
    with torch.no_grad():
        scores = scorer.score_steps(batch)
    for row, step in enumerate(batch.steps):
        expected = alone(model, inputs, step, response_type)
        torch.testing.assert_close(scores.token_log_probs[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)
        stopping = dataclasses.replace(step, response_ids=[*step.response_ids[: step.cot_end], *step.stop_ids])
        log_stop = alone(model, inputs, stopping, response_type)[step.cot_end :].sum()
        torch.testing.assert_close(scores.log_stop[row], log_stop, atol=5e-5, rtol=1e-5)


def test_a_later_token_changes_no_earlier_log_probability(family):
    _, model, inputs = family
    scorer = Scorer(model, inputs, CPU, token_budget=100_000)
    step = responses(inputs)[1]
    other = dataclasses.replace(step, response_ids=[*step.response_ids[:-1], inputs.end_id])
    found = []
    for changed in (step, other):
        (batch,) = scorer.pack([changed])
        with torch.no_grad():
            found.append(scorer.score_steps(batch).token_log_probs[0])
    last = len(step.response_ids) - 1
    assert torch.equal(found[0][:last], found[1][:last])
    assert found[0][last] != found[1][last]


def test_supervised_training_weighs_the_same_log_probabilities(family):
    name, model, inputs = family
    text = '{"thoughts": "3 is below 5", "action": "go up"}'
    examples = [SftExample(step.prompt, step.image, text) for step in responses(inputs)[1:4]]
    found = -sft_loss(model, inputs, examples, content_weight=1.0)[0].detach()
    ids = inputs.encode_response(text)
    alike = [ScoredStep(e.prompt, e.image, ids, 0, len(ids)) for e in examples]
    response_type = 1 if name.startswith("paligemma") else 0
    expected = sum(alone(model, inputs, step, response_type).sum() for step in alike)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_a_prompt_that_sees_all_of_itself_is_shared_among_responses_that_do_not(family_folder, shared):
    """PaliGemma of the first kind: without sliding windows its prompts can be passed once."""
    folder = family_folder("paligemma2")
    config = AutoConfig.from_pretrained(folder)
    sizes = config.text_config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    config.text_config = GemmaConfig(**{name: sizes[name] for name in kept}, num_key_value_heads=2)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    inputs = PolicyInputs.load(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim >= 2 else 1.0)
    assert_scored_as_alone(model, inputs, shared, response_type=1)
    # With type 0 a response would be part of the prompt.
    step = responses(inputs)[1]
    as_prompt, as_response = (alone(model, inputs, step, response_type) for response_type in (0, 1))
    assert float((as_prompt - as_response).abs().max()) > 1e-3
