import dataclasses

import pytest
import torch

from gflowvlm.learner.model import adapter_parameters, load_policy
from gflowvlm.learner.packing import Packer, steps_of
from gflowvlm.learner.scoring import Scorer
from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import EndReason

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(tiny_model):
    policy = load_policy(PolicySettings(), tiny_model, seed=0, device=CPU)
    with torch.no_grad():
        for _, parameter in adapter_parameters(policy):
            parameter.add_(0.02)
    return policy


@pytest.fixture
def steps(make_trajectory):
    return steps_of(make_trajectory.batch())


def token_log_probs(policy, inputs, step):
    """Brute force: one unpadded sequence, all logits, log-softmax."""
    encoded = dict(inputs.encode([step.prompt], [step.image]))
    prompt = encoded["input_ids"].shape[1]
    response = torch.tensor([step.response_ids])
    encoded["input_ids"] = torch.cat([encoded["input_ids"], response], dim=1)
    encoded["attention_mask"] = torch.ones_like(encoded["input_ids"])
    with torch.no_grad():
        table = policy(**encoded, use_cache=False).logits[0, prompt - 1 : -1].log_softmax(dim=-1)
    return table, table[torch.arange(len(step.response_ids)), response[0]]


def test_padded_scores_equal_those_of_unpadded_sequences(policy, tiny_inputs, steps):
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    (batch,) = scorer.pack(steps)
    assert len({len(step.response_ids) for step in batch.steps}) > 2
    assert 1 < len(batch.states) < len(batch.steps)
    with torch.no_grad():
        scores = scorer.score_steps(batch)
    done = tiny_inputs.done_id
    for row, step in enumerate(batch.steps):
        table, tokens = token_log_probs(policy, tiny_inputs, step)
        # `[DONE]` comes behind the token that opens the action's value.
        stop = [] if step.action_end == step.cot_end else [tokens[step.cot_end], table[step.cot_end + 1, done]]
        expected = [
            tokens[step.cot_end : step.action_end].sum(),
            tokens[: step.cot_end].sum(),
            torch.tensor(0.0) + sum(stop),
            tokens[step.action_end :].sum(),
        ]
        torch.testing.assert_close(scores.stacked()[row], torch.stack(expected), atol=2e-4, rtol=1e-5)
        n = len(step.response_ids)
        torch.testing.assert_close(scores.token_log_probs[row, :n], tokens, atol=2e-5, rtol=1e-5)
        assert bool((scores.token_log_probs[row, n:] == 0).all())


def test_a_state_that_is_passed_once_has_the_scores_and_gradients_of_one_passed_for_each_response(
    policy, tiny_inputs, steps
):
    shared, separate = (Scorer(policy, tiny_inputs, CPU, token_budget=100_000) for _ in range(2))
    separate._packer = Packer(tiny_inputs, 100_000, shares_prompts=False)
    passed = []
    hook = (
        policy.get_base_model()
        .get_input_embeddings()
        .register_forward_hook(lambda _, args, __: passed.append(args[0].numel()))
    )
    found = []
    for scorer in (shared, separate):
        (batch,) = scorer.pack(steps)
        passed.clear()
        scores = scorer.score_steps(batch, with_hidden=True)
        tokens = sum(passed)
        ordered = torch.argsort(torch.tensor(batch.index))
        stacked, hidden = scores.stacked()[ordered], scores.hidden[ordered]
        policy.zero_grad()
        weights = torch.arange(stacked.numel()).reshape(stacked.shape).cos()
        ((stacked * weights).sum() + hidden.square().sum()).backward()
        found.append((stacked, hidden, [p.grad.clone() for _, p in adapter_parameters(policy)], tokens))
    hook.remove()
    policy.zero_grad()
    torch.testing.assert_close(found[0][:3], found[1][:3], atol=1e-3, rtol=1e-4)
    assert found[0][3] < 0.7 * found[1][3]


def test_prompts_are_not_shared_where_a_pass_does_not_leave_all_keys_behind(tiny_model, tiny_inputs, steps):
    checkpointed = load_policy(PolicySettings(gradient_checkpointing=True), tiny_model, seed=0, device=CPU)
    sliding = load_policy(PolicySettings(), tiny_model, seed=0, device=CPU)
    sliding.get_base_model().config.get_text_config().sliding_window = 16
    for policy in (checkpointed, sliding):
        (batch,) = Scorer(policy, tiny_inputs, CPU, token_budget=100_000).pack(steps)
        assert batch.states == batch.steps


def test_choosing_to_stop_scores_the_same_as_the_stop_probability(policy, tiny_inputs, make_trajectory):
    steps = steps_of([make_trajectory(["+", "[DONE]"], EndReason.DONE)])
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    (batch,) = scorer.pack(steps)
    with torch.no_grad():
        scores = scorer.score_steps(batch)
    chosen = [i for i, step in enumerate(batch.steps) if step is steps[1]]
    assert torch.equal(scores.log_act[chosen], scores.log_stop[chosen])
    assert not torch.equal(scores.log_act, scores.log_stop)


def is_stop(step):
    return step.has_stop and [*step.response_ids[step.cot_end :]][: len(step.stop_ids)] == [*step.stop_ids]


def with_other_stops(steps, inputs):
    """Every other step's stop begins as no response goes on; one that was played is its own tokens."""
    foreign = inputs.tokenizer.encode("stop", add_special_tokens=False)
    assert len(foreign) > 1
    return [
        dataclasses.replace(step, stop_ids=[*foreign, inputs.done_id])
        if i % 2 == 0 and step.has_stop and not is_stop(step)
        else step
        for i, step in enumerate(steps)
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_a_stop_that_begins_otherwise_is_scored_behind_the_same_chain_of_thought(policy, tiny_inputs, steps, shared):
    steps = with_other_stops(steps, tiny_inputs)
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    scorer._packer = Packer(tiny_inputs, 100_000, shares_prompts=shared)
    (batch,) = scorer.pack(steps)
    assert batch.is_shared == shared
    with torch.no_grad():
        scores = scorer.score_steps(batch, with_hidden=True)
        without = scorer.score_steps(batch, with_stops=False)
    assert scores.hidden.shape[0] == len(steps)
    outside = 0
    for row, step in enumerate(batch.steps):
        expected = torch.tensor(0.0)
        if step.has_stop:
            outside += step.stop_column is None
            stopping = dataclasses.replace(step, response_ids=[*step.response_ids[: step.cot_end], *step.stop_ids])
            expected = token_log_probs(policy, tiny_inputs, stopping)[1][step.cot_end :].sum()
        torch.testing.assert_close(scores.log_stop[row], expected, atol=2e-4, rtol=1e-5)
        _, tokens = token_log_probs(policy, tiny_inputs, step)
        torch.testing.assert_close(scores.token_log_probs[row, : len(tokens)], tokens, atol=2e-5, rtol=1e-5)
    assert outside > 2
    torch.testing.assert_close(without.log_act, scores.log_act)


def test_the_gradient_of_a_stop_of_its_own_row_reaches_the_adapter(policy, tiny_inputs, steps):
    chosen = [step for step in with_other_stops(steps, tiny_inputs) if step.has_stop][:2]
    found = []
    for ids in ([step.response_ids for step in chosen], [[*s.response_ids[: s.cot_end], *s.stop_ids] for s in chosen]):
        scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
        asked = [dataclasses.replace(s, response_ids=i) for s, i in zip(chosen, ids, strict=True)]
        (batch,) = scorer.pack(asked)
        policy.zero_grad()
        scorer.score_steps(batch).log_stop.sum().backward()
        found.append([p.grad.clone() for _, p in adapter_parameters(policy)])
        # The second time the responses are the stops: nothing is passed on its own.
        assert len(batch.stops) == len(found) % 2
    policy.zero_grad()
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-4)


def test_stops_are_not_passed_where_the_objective_needs_none(policy, tiny_inputs, steps):
    steps = with_other_stops(steps, tiny_inputs)
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000, with_stops=False)
    (batch,) = scorer.pack(steps)
    assert batch.stops == []
    with torch.no_grad():
        log_stop = scorer.score_steps(batch).log_stop
    played = torch.tensor([is_stop(step) for step in batch.steps])
    assert 0 < int(played.sum()) < len(steps)
    assert torch.equal(log_stop != 0, played)


def test_malformed_response_is_all_chain_of_thought(policy, tiny_inputs, make_trajectory):
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    (batch,) = scorer.pack(steps_of([make_trajectory([None], EndReason.INVALID)]))
    with torch.no_grad():
        scores = scorer.score_steps(batch)
    assert float(scores.log_act) == 0.0
    assert float(scores.log_stop) == 0.0
    assert float(scores.log_cot) == pytest.approx(float(scores.token_log_probs.sum()), abs=1e-3)


def test_models_that_cannot_leave_logits_out_score_the_same(policy, tiny_inputs, steps):
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    (batch,) = scorer.pack(steps)
    expected = scorer.score_steps(batch).stacked()
    scorer._keeps_logits = False
    torch.testing.assert_close(scorer.score_steps(batch).stacked(), expected)
    with_hidden = scorer.score_steps(batch, with_hidden=True).hidden
    scorer._keeps_logits = True
    torch.testing.assert_close(scorer.score_steps(batch, with_hidden=True).hidden, with_hidden)


def test_hidden_states_are_those_of_the_last_prompt_token(policy, tiny_inputs, steps):
    """Brute force: the unpadded prompt alone, all layers' states."""
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    (batch,) = scorer.pack(steps)
    with torch.no_grad():
        found = scorer.score_steps(batch, with_hidden=True).hidden
        for row, step in enumerate(batch.steps):
            encoded = tiny_inputs.encode([step.prompt], [step.image])
            states = policy(**encoded, use_cache=False, output_hidden_states=True).hidden_states
            torch.testing.assert_close(found[row], states[-1][0, -1], atol=2e-5, rtol=1e-5)
    assert found.shape == (len(batch.steps), scorer.hidden_size())


def test_hidden_states_cost_nothing_when_they_are_not_asked_for(policy, tiny_inputs, steps):
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    (batch,) = scorer.pack(steps[:2])
    scorer.score_steps(batch, with_hidden=True)
    assert scorer.score_steps(batch).hidden is None
    assert len(policy.get_base_model().get_output_embeddings()._forward_pre_hooks) == 0


def test_a_model_without_an_output_layer_is_one_line(policy, tiny_inputs):
    scorer = Scorer(policy, tiny_inputs, CPU, token_budget=100_000)
    scorer._head.layer = None
    with pytest.raises(UserError, match=r"objective\.loss: .* no output layer"):
        scorer.hidden_size()
