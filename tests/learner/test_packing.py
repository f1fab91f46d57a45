from dataclasses import replace

import pytest

from gflowvlm.learner.packing import Packer, steps_of
from gflowvlm.shared.pictures import picture_sizes


@pytest.fixture
def steps(make_trajectory):
    return steps_of(make_trajectory.batch())


def padded_tokens(inputs, batch):
    """Brute force: what the processor makes of the batch's states, and their responses."""
    prompts = inputs.encode([s.prompt for s in batch.states], [s.image for s in batch.states])["input_ids"]
    return prompts.numel() + len(batch.steps) * max(len(step.response_ids) for step in batch.steps)


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_packing_keeps_the_budget_and_every_step_once(tiny_inputs, steps, shares_prompts):
    batches = Packer(tiny_inputs, 400, shares_prompts=shares_prompts).pack(steps)
    assert sorted(i for batch in batches for i in batch.index) == list(range(len(steps)))
    assert len(batches) < len(steps)
    for batch in batches:
        assert [steps[i] for i in batch.index] == batch.steps
        assert padded_tokens(tiny_inputs, batch) <= 400
    assert Packer(tiny_inputs, 400, shares_prompts=shares_prompts).pack([]) == []


def test_a_state_stands_once_in_a_micro_batch_and_every_response_has_its_own(tiny_inputs, steps):
    (batch,) = Packer(tiny_inputs, 100_000, shares_prompts=True).pack(steps)
    states = [(state.prompt, state.image) for state in batch.states]
    assert len(set(states)) == len(states) == len({(step.prompt, step.image) for step in steps})
    assert [states[i] for i in batch.state_of] == [(step.prompt, step.image) for step in batch.steps]
    other_picture = replace(batch.states[0], image=batch.states[-1].image + b" ")
    (more,) = Packer(tiny_inputs, 100_000, shares_prompts=True).pack([*steps, other_picture])
    assert len(more.states) == len(states) + 1


def test_a_step_beyond_the_budget_is_a_micro_batch_of_its_own(tiny_inputs, steps):
    assert all(len(batch.index) == 1 for batch in Packer(tiny_inputs, 64, shares_prompts=True).pack(steps))


def test_the_size_of_a_picture(steps):
    assert picture_sizes(steps[0].image) == ((64, 64),)


@pytest.mark.parametrize("shared", [True, False])
def test_stops_of_their_own_rows_count_in_the_budget_and_once_for_a_chain_of_thought(tiny_inputs, steps, shared):
    foreign = [*tiny_inputs.tokenizer.encode("stop", add_special_tokens=False), tiny_inputs.done_id]
    step = next(step for step in steps if step.has_stop)
    # Two answers behind one chain of thought: one stop, if the prompt is one.
    other = replace(step, response_ids=[*step.response_ids[:-1], *foreign])
    pair = [replace(s, stop_ids=foreign) for s in (step, other)]
    packer = Packer(tiny_inputs, 100_000, shares_prompts=shared)
    (batch,) = packer.pack(pair)
    assert len(batch.stops) == (1 if shared else 2)
    assert batch.stop_of == ([0, 0] if shared else [0, 1])
    assert [batch.states[place].prompt for place in batch.state_of] == [step.prompt] * (3 if shared else 4)
    prompt = tiny_inputs.encode([step.prompt], [step.image])["input_ids"].shape[1]
    rows, width = len(batch.state_of), max(len(ids) for ids in (*(s.response_ids for s in pair), batch.stops[0].ids))
    tokens = len(batch.states) * prompt + rows * width
    assert len(Packer(tiny_inputs, tokens, shares_prompts=shared).pack(pair)) == 1
    assert len(Packer(tiny_inputs, tokens - 1, shares_prompts=shared).pack(pair)) == 2
    assert Packer(tiny_inputs, 100_000, shares_prompts=shared, with_stops=False).pack(pair)[0].stops == []
