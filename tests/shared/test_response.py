import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowvlm.shared.response import DONE_TOKEN, format_response, parse_response


def test_a_formatted_response_is_read_back_with_the_actions_place():
    text = format_response("+", "3 is below 5", {"current": 3, "target": 5})
    parsed = parse_response(text)
    assert (parsed.action, parsed.thoughts, parsed.fields) == ("+", "3 is below 5", {"current": 3, "target": 5})
    start, end = parsed.action_chars
    assert text[start:end] == "+"


def test_the_stop_action_is_read_like_any_other():
    assert parse_response(format_response(DONE_TOKEN, "equal")).action == DONE_TOKEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "{}",
        '{"action": "+", "thoughts": "later"}',
        '{"action": "+"} trailing',
        '{"thoughts": "unclosed, "action": "+"}',
        '{"action": "-", "action": "+"}',
        '[{"action": "+"}]',
        '{"action": {"action": "+"}}',
        '{"action": 1}',
        '{"action": "a\\"b"}',
        "[" * 5000 + '{"action": "+"}',
        '{"x": ' * 5000 + '{"action": "+"}' + "}" * 5000,
        '{"thoughts": "' + "x" * 30_000 + '", "action": "+"}',
        "\ud800\ud801",
        "<image>" * 50,
    ],
)
def test_anything_but_the_documented_format_is_malformed(text):
    assert parse_response(text).malformed


@given(st.text(max_size=200))
def test_no_text_raises(text):
    parse_response(text)
    parse_response('{"thoughts": ' + json.dumps(text) + ', "action": "+"}')


def test_thoughts_that_look_like_an_action_are_not_taken_for_it():
    text = format_response("-", 'so "action": "+"}')
    assert parse_response(text).action == "-"
