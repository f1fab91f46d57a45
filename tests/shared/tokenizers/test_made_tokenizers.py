"""Responses in the tokens of every kind of tokenizer, small ones that were trained here."""

from functools import cache

import numpy as np
import pytest

from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from tests.shared.tokenizers.made import ACTIONS, DONE, FIELDS, KINDS, THOUGHTS, inputs_of, make_tokenizer
from tests.shared.tokenizers.response_checks import check_actions, check_round_trip, in_other_tokens

every_tokenizer = pytest.mark.parametrize("done", DONE)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_format = pytest.mark.parametrize("answers_as", ["json", "tags"])
tokenizer = cache(make_tokenizer)


def cases(inputs: PolicyInputs) -> list[tuple[str, tuple[str, ...]]]:
    """Returns answers with the first of the actions that are admissible in their place."""
    written = inputs.answer_format
    found = []
    for number, thought in enumerate(THOUGHTS):
        for actions in ACTIONS:
            # Tags leave white space around a value out.
            named = tuple(a for a in actions if a.strip() == a) if "<action>" in written.instruction({}) else actions
            found.append((written.render(named[0], thought, FIELDS[number % len(FIELDS)]), named))
    return found


@every_format
@every_tokenizer
@every_kind
def test_answers_come_back_and_actions_add_up_to_one_at_most(kind: str, done: str, answers_as: str) -> None:
    inputs = inputs_of(tokenizer(kind, done), answers_as)
    for text, actions in cases(inputs):
        response = check_round_trip(inputs, text, actions[0])
        assert check_actions(inputs, response, actions) == len(actions)
    if inputs.done_id is not None:
        stop = inputs.read(response).layout.stop_ids
        assert stop[-1] == inputs.done_id


@every_format
@every_tokenizer
@every_kind
def test_thoughts_that_were_sampled_in_other_tokens_keep_them(kind: str, done: str, answers_as: str) -> None:
    inputs = inputs_of(tokenizer(kind, done), answers_as)
    rng = np.random.default_rng(7)
    differ = 0
    for text, actions in cases(inputs)[::3]:
        response = in_other_tokens(inputs, text, rng)
        differ += response != inputs.encode_response(text)
        assert inputs.read(response).parsed.action == actions[0]
        assert check_actions(inputs, response, actions) == len(actions)
    assert differ > 0


@pytest.mark.parametrize(
    ("kind", "done"),
    [(kind, done) for kind in KINDS for done in DONE if not (done == "[DONE] normalized" and "prepended" in kind)],
)
def test_done_is_one_token_of_its_own_where_the_tokenizer_has_it(kind: str, done: str) -> None:
    inputs = inputs_of(tokenizer(kind, done), "json")
    assert (inputs.done_id is None) is (DONE[done] is None)
    ids = inputs.encode_response(inputs.answer_format.render(DONE_TOKEN, "[DONE] is right", {}))
    assert ids.count(inputs.done_id) == (0 if DONE[done] is None else 2)
    if inputs.done_id is not None:
        assert inputs.done_id not in inputs.forbidden_ids


def test_a_done_token_that_brings_a_space_is_written_in_several_tokens() -> None:
    made = tokenizer("sentencepiece, space prepended", "[DONE] normalized")
    assert DONE_TOKEN in made.get_vocab() or f"▁{DONE_TOKEN}" in made.get_vocab()
    assert inputs_of(made, "json").done_id is None


@every_kind
def test_characters_are_those_of_each_token(kind: str) -> None:
    inputs = inputs_of(tokenizer(kind, "[DONE]"), "json")
    for text, _ in cases(inputs)[::5]:
        ids = inputs.encode_response(text)
        spans = inputs.characters(ids)
        assert len(spans) == len(ids)
        assert "".join(text[start:end] for start, end in spans) == text
        assert spans[-1] == (len(text), len(text))
